// SPDX-License-Identifier: MIT
#pragma once

#include <nlohmann/json.hpp>

#include <optional>

namespace benchmark::detail {

/// null where there is no value.
inline nlohmann::ordered_json json_if(std::optional<double> value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json();
}

} // namespace benchmark::detail

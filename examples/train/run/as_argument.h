// SPDX-License-Identifier: MIT
#pragma once

#include "support/printable.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <string>

namespace training {

/// A setting as a user gives it; its value may come from a file.
inline std::string as_argument(
    const std::string& key,
    const nlohmann::json& value) {
  if (key == "checkpoint_transitions") {
    return value == true ? "no --keep-transitions" : "--keep-transitions";
  }
  if (key == "engine" && value == "plain") {
    return "--plain";
  }
  if (key == "model" || key == "dataset") {
    return (key == "model" ? "MODEL " : "DATASET ") +
        support::printable(value.dump());
  }
  std::string flag =
      "--" + (key == "memory_budget_mib" ? "memory_budget" : key);
  std::replace(flag.begin(), flag.end(), '_', '-');
  return value.is_null() || value == false ? "no " + flag
      : value == true                      ? flag
                      : flag + " " + support::printable(value.dump());
}

} // namespace training

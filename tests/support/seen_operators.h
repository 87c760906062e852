// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/record_function.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace detail {

inline std::vector<std::string>& seen_operators() {
  thread_local std::vector<std::string> names;
  return names;
}

} // namespace detail

/// The operators that this thread runs while a call lasts, those inside of others
/// too, by name: "aten::cat".
template <class Call>
std::vector<std::string> operators_of(const Call& call) {
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(
          [](const at::RecordFunction& function)
              -> std::unique_ptr<at::ObserverContext> {
            detail::seen_operators().emplace_back(function.name());
            return nullptr;
          })
          .scopes({at::RecordScope::FUNCTION}));
  detail::seen_operators().clear();
  call();
  at::removeCallback(handle);
  return std::exchange(detail::seen_operators(), {});
}

} // namespace memcnn_test

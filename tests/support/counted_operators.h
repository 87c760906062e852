// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/operator_handler.h>

#include <map>
#include <string>

namespace memcnn_test {

/// Counts the dear operators that run in this thread while it lives. Those of
/// which a kept result is taken do not run.
class CountedOperators final : public memcnn::detail::OperatorHandler {
 public:
  using Counts = std::map<std::string, int>;

  /// By name, "aten::mm"; those that did not run are not there.
  Counts counts() const {
    return counts_;
  }

  int count(const std::string& name) const {
    const auto found = counts_.find(name);
    return found == counts_.end() ? 0 : found->second;
  }

 private:
  void handle(const Call& call) override {
    ++counts_[call.op.operator_name().name];
    run(call);
  }

  Counts counts_;
};

} // namespace memcnn_test

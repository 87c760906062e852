// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/record_function.h>
#include <torch/torch.h>

#include <cstring>
#include <memory>

namespace memcnn_test {

/// How often an operator ran in this thread while this lives. One at a time.
class OperatorCount {
 public:
  /// What a convolution runs below autograd, unless its result was kept.
  static constexpr const char* kConvolution = "aten::_convolution";

  explicit OperatorCount(const char* name)
      : callback_(
            at::addThreadLocalCallback(at::RecordFunctionCallback(&see).scopes(
                {at::RecordScope::FUNCTION}))) {
    name_ = name;
    count_ = 0;
  }
  OperatorCount(const OperatorCount&) = delete;
  OperatorCount& operator=(const OperatorCount&) = delete;
  ~OperatorCount() {
    at::removeCallback(callback_);
  }

  int count() const {
    return count_;
  }

 private:
  static std::unique_ptr<at::ObserverContext> see(
      const at::RecordFunction& function) {
    count_ += std::strcmp(function.name(), name_) == 0 ? 1 : 0;
    return nullptr;
  }

  static inline thread_local const char* name_ = "";
  static inline thread_local int count_ = 0;
  at::CallbackHandle callback_;
};

} // namespace memcnn_test

// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

namespace memcnn::detail {

/// A tensor that backward will read, and the version it has to have by then.
class Saved {
 public:
  Saved() = default;
  explicit Saved(at::Tensor tensor)
      : tensor_(std::move(tensor)), version_(tensor_._version()) {}

  bool defined() const {
    return tensor_.defined();
  }
  bool unchanged() const {
    return !defined() || tensor_._version() == version_;
  }
  const at::Tensor& get() const {
    return tensor_;
  }
  at::Tensor take() {
    return std::move(tensor_);
  }

 private:
  at::Tensor tensor_;
  int64_t version_ = 0;
};

} // namespace memcnn::detail

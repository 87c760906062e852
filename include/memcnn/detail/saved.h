// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

namespace memcnn::detail {

/// A tensor that backward will read, and the version and the memory that it has
/// to have by then.
class Saved {
 public:
  Saved() = default;
  explicit Saved(at::Tensor tensor)
      : tensor_(std::move(tensor)),
        version_(version_of(tensor_)),
        memory_(tensor_) {}

  bool defined() const {
    return tensor_.defined();
  }
  /// Whether nobody has written to it.
  bool unchanged() const {
    return !defined() || version_of(tensor_) == version_;
  }
  /// Whether it has not got other memory, which no version tells.
  bool keeps_memory() const {
    return !defined() || memory_.is_of(tensor_);
  }
  const at::Tensor& get() const {
    return tensor_;
  }
  at::Tensor take() {
    return std::move(tensor_);
  }

 private:
  at::Tensor tensor_;
  uint32_t version_ = 0;
  NotedMemory memory_;
};

} // namespace memcnn::detail

// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>

namespace memcnn::detail {

/// The tensor without gaps, in the memory format that it is nearest to: a copy
/// where it has gaps, as half of the channels of a larger tensor has. Kernels
/// are several times slower on those.
inline at::Tensor dense(const at::Tensor& tensor) {
  return tensor.contiguous(tensor.suggest_memory_format());
}

} // namespace memcnn::detail

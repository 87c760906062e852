// SPDX-License-Identifier: MIT
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace memcnn::detail {

/// How many binary digits a floating point dtype holds exactly; 0 for others.
inline int64_t digits_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 53;
    case at::kFloat:
      return 24;
    case at::kHalf:
      return 11;
    case at::kBFloat16:
      return 8;
    default:
      return 0;
  }
}

} // namespace memcnn::detail

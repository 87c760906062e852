// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/autocast_mode.h>

namespace support {

/// Lets a network compute in bfloat16 where that is accurate enough, until the
/// end of scope.
class AutocastGuard final {
 public:
  AutocastGuard(at::DeviceType device, bool enabled)
      : device_(device),
        was_enabled_(at::autocast::is_autocast_enabled(device)) {
    at::autocast::increment_nesting();
    at::autocast::set_autocast_enabled(device_, enabled);
    if (enabled) {
      at::autocast::set_autocast_dtype(device_, at::kBFloat16);
    }
  }

  ~AutocastGuard() {
    at::autocast::set_autocast_enabled(device_, was_enabled_);
    if (at::autocast::decrement_nesting() == 0) {
      at::autocast::clear_cache();
    }
  }

  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  at::DeviceType device_;
  bool was_enabled_;
};

} // namespace support

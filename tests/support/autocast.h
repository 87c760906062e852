// SPDX-License-Identifier: MIT
#pragma once

#include <torch/torch.h>

#include <ATen/autocast_mode.h>

namespace memcnn_test {

/// Autocast to a dtype, for the length of a scope.
class Autocast final {
 public:
  Autocast(torch::DeviceType device, torch::ScalarType dtype)
      : device_(device), found_(at::autocast::get_autocast_dtype(device)) {
    at::autocast::increment_nesting();
    at::autocast::set_autocast_enabled(device_, true);
    at::autocast::set_autocast_dtype(device_, dtype);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;
  ~Autocast() {
    at::autocast::set_autocast_enabled(device_, false);
    at::autocast::set_autocast_dtype(device_, found_);
    if (at::autocast::decrement_nesting() == 0) {
      at::autocast::clear_cache();
    }
  }

 private:
  torch::DeviceType device_;
  torch::ScalarType found_;
};

} // namespace memcnn_test

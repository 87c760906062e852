// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/autocast_mode.h>
#include <c10/core/Device.h>
#include <c10/util/SmallVector.h>

namespace memcnn::detail {

/// Whether operators on a device cast by themselves.
inline bool is_autocast_on(at::Device device) {
  return at::autocast::is_autocast_available(device.type()) &&
      at::autocast::is_autocast_enabled(device.type());
}

/// Whether and to which dtype autocast casts, for the CPU and one more device.
class AutocastState {
 public:
  static AutocastState now(at::Device device) {
    AutocastState state;
    state.add(at::kCPU);
    if (!device.is_cpu() &&
        at::autocast::is_autocast_available(device.type())) {
      state.add(device.type());
    }
    return state;
  }

  void restore() const {
    for (const Setting& setting : settings_) {
      at::autocast::set_autocast_enabled(setting.device, setting.enabled);
      at::autocast::set_autocast_dtype(setting.device, setting.dtype);
    }
  }

 private:
  struct Setting {
    at::DeviceType device;
    bool enabled;
    at::ScalarType dtype;
  };

  void add(at::DeviceType device) {
    settings_.push_back(
        {device,
         at::autocast::is_autocast_enabled(device),
         at::autocast::get_autocast_dtype(device)});
  }

  c10::SmallVector<Setting, 2> settings_;
};

/// Leaves the caller's autocast settings as it found them.
class AutocastGuard {
 public:
  explicit AutocastGuard(at::Device device)
      : found_(AutocastState::now(device)) {}
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;
  ~AutocastGuard() {
    found_.restore();
  }

 private:
  AutocastState found_;
};

/// Keeps autocast from remembering weight casts while a module runs.
///
/// The cache is shared by the whole process: a cast made without a graph would
/// be reused by the run that needs one, and the weight's gradient would be lost
/// without a word (Note [Recomputation], rule 5).
class AutocastCacheOff {
 public:
  AutocastCacheOff() : found_(at::autocast::is_autocast_cache_enabled()) {
    at::autocast::set_autocast_cache_enabled(false);
  }
  AutocastCacheOff(const AutocastCacheOff&) = delete;
  AutocastCacheOff& operator=(const AutocastCacheOff&) = delete;
  ~AutocastCacheOff() {
    at::autocast::set_autocast_cache_enabled(found_);
  }

 private:
  bool found_;
};

} // namespace memcnn::detail

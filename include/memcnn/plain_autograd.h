// SPDX-License-Identifier: MIT
#pragma once

#include <utility>

namespace memcnn {

/// While it lives, wrappers, sequences and checkpoint() that are called in this
/// thread run as plain autograd, as with their option `disable`: for comparing
/// a whole model with itself.
///
/// The network stays the same one: fractional_bits rounds, and memory_format
/// converts, as ever. A graph that was recorded before the scope goes backward
/// inside of it, and one that was recorded inside goes backward after it: how a
/// call runs is decided in forward. Guards nest; each puts back what it found.
///
/// Example:
///   const memcnn::PlainAutogradGuard plain;
///   model->forward(x).sum().backward(); // all activations are kept
class PlainAutogradGuard {
 public:
  /// Plain autograd; with false, what saves memory again, inside of another
  /// guard.
  explicit PlainAutogradGuard(bool enabled = true)
      : before_(std::exchange(enabled_, enabled)) {}
  ~PlainAutogradGuard() {
    enabled_ = before_;
  }
  PlainAutogradGuard(const PlainAutogradGuard&) = delete;
  PlainAutogradGuard& operator=(const PlainAutogradGuard&) = delete;

  /// Whether a guard holds in this thread.
  static bool is_enabled() {
    return enabled_;
  }

 private:
  static inline thread_local bool enabled_ = false;
  bool before_;
};

} // namespace memcnn

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/capture.h>
#include <memcnn/detail/digits.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// The range in which multiples of 2^-k are added without rounding, in one dtype
/// and for one place in the code, "AdditiveCoupling::forward(): ".
struct ExactRange {
  std::string place;
  int64_t fractional_bits;
  at::ScalarType dtype;

  bool operator==(const ExactRange& other) const {
    return place == other.place && fractional_bits == other.fractional_bits &&
        dtype == other.dtype;
  }

  int64_t exponent() const {
    return digits_of(dtype) - fractional_bits;
  }

  /// NaN compares false with everything: it is no overflow of the range, and
  /// spreads as without the exact mode.
  bool is_left_by(double largest) const {
    return largest >= std::ldexp(1.0, static_cast<int>(exponent()));
  }

  /// `where` says what the value was met in.
  void check(double largest, const std::string& where) const {
    TORCH_CHECK_VALUE(
        !is_left_by(largest),
        place,
        "expected values below 2^",
        exponent(),
        " = ",
        std::ldexp(1.0, static_cast<int>(exponent())),
        ", where fractional_bits(",
        fractional_bits,
        ") is exact in ",
        dtype,
        ", but got ",
        largest,
        " (",
        where,
        "). Set fewer fractional_bits, or normalise the values.");
  }
};

inline void synchronise(at::Device device) {
  if (!device.is_cpu()) {
    c10::impl::VirtualGuardImpl(device.type())
        .synchronizeDevice(device.index());
  }
}

/// The largest value that a device met in a range, noted by the device itself
/// (Note [Exact mode], rule 3).
class RangeFlag {
 public:
  /// Not in a capture: each replay is to find what the one before left.
  RangeFlag(ExactRange range, at::Device device)
      : range_(std::move(range)), device_(device) {
    const c10::InferenceMode off(false);
    const auto options = at::TensorOptions(range_.dtype);
    largest_ = at::zeros({}, options.device(device));
    seen_ = at::zeros({}, options.pinned_memory(!device.is_cpu()));
    synchronise(device); // before other streams use it
  }

  bool is_of(const ExactRange& range, at::Device device) const {
    return range_ == range && device_ == device;
  }

  at::Device device() const {
    return device_;
  }

  /// Has the device take a tensor into account: two kernels, no wait.
  void note(const at::Tensor& tensor) {
    const at::NoGradGuard no_grad;
    // Autocast would make it a float32 of a copy.
    const c10::impl::ExcludeDispatchKeyGuard as_it_is(
        c10::autocast_dispatch_keyset);
    const at::Tensor largest = at::linalg_vector_norm(
        tensor.detach(), std::numeric_limits<double>::infinity());
    // What is NaN is left out, or no later value would count.
    at::fmax_out(largest_, largest_, largest);
  }

  /// Stops where a value was out of range, as far as the host has heard of it,
  /// and lets the device send its newest: no wait.
  void report() {
    if (range_.is_left_by(seen_.item<double>())) {
      check();
    }
    const at::NoGradGuard no_grad;
    seen_.copy_(largest_, /*non_blocking=*/true);
  }

  /// Stops where a value was out of range, once: waits for the device.
  void check() {
    synchronise(device_); // all its streams, and what they send
    const double largest = largest_.item<double>();
    if (range_.is_left_by(largest)) {
      const at::NoGradGuard no_grad;
      largest_.zero_();
      seen_.zero_();
    }
    range_.check(largest, c10::str("in an earlier call on ", device_));
  }

 private:
  ExactRange range_;
  at::Device device_;
  at::Tensor largest_;
  at::Tensor seen_; // by the host
};

/// One flag for each range and device. They stay as long as the process: graphs
/// write to them.
class RangeFlags {
 public:
  /// Of all devices.
  static RangeFlags& all() {
    static auto* const flags = new RangeFlags;
    return *flags;
  }

  RangeFlag& of(const ExactRange& range, at::Device device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& flag : flags_) {
      if (flag->is_of(range, device)) {
        return *flag;
      }
    }
    TORCH_CHECK(
        capture_of(device) == 0,
        range.place,
        "expected an eager run with the same fractional_bits and dtype before "
        "it is captured, but got the first one in ",
        describe_capture(capture_of(device)),
        " of ",
        device,
        ". Run whole steps before the capture.");
    return *flags_.emplace_back(std::make_unique<RangeFlag>(range, device));
  }

  void check(at::Device device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& flag : flags_) {
      if (flag->device() == device) {
        flag->check();
      }
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<RangeFlag>> flags_;
};

/// Whether the CPU notes values as other devices do: for tests alone. Its own
/// way, an error at once, costs no wait there.
inline bool& cpu_notes_ranges() {
  static bool notes = false;
  return notes;
}

/// Whether a device notes values that leave a range, for the host to report
/// later.
inline bool notes_ranges(at::Device device) {
  return !device.is_cpu() || cpu_notes_ranges();
}

} // namespace memcnn::detail

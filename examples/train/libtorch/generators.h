// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/format_error.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>
#include <torch/types.h>

#include <cstdint>
#include <cstring>
#include <mutex>

namespace training {

namespace detail {

/// Whether LibTorch may read the numbers of a state of the CPU's generator. It
/// checks how many are left and which is next, but each by itself: together they
/// may lead beyond the last.
inline bool stays_within(const torch::Tensor& state) {
  constexpr size_t kLeftAt = 8; // as LibTorch lays a state out
  constexpr size_t kNextAt = 16;
  constexpr uint64_t kNumbers = 624;
  int32_t left = 0;
  uint64_t next = 0;
  const auto* bytes = state.const_data_ptr<uint8_t>();
  std::memcpy(&left, bytes + kLeftAt, sizeof left);
  std::memcpy(&next, bytes + kNextAt, sizeof next);
  return left > 0 && next <= kNumbers &&
      next + static_cast<uint64_t>(left) <= kNumbers + 1;
}

} // namespace detail

/// Where the default generator of a device is in its sequence, on the CPU.
inline torch::Tensor generator_state(torch::Device device) {
  auto generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

/// Lets the default generator of a device go on from there.
///
/// Throws:   FormatError if it is no state of such a generator.
inline void set_generator_state(
    torch::Device device,
    const torch::Tensor& state) {
  auto generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  const torch::Tensor now = generator.get_state();
  const bool fits = state.dtype() == now.dtype() &&
      state.sizes() == now.sizes() && state.is_contiguous();
  try {
    if (fits && (!device.is_cpu() || detail::stays_within(state))) {
      generator.set_state(state.cpu());
      return;
    }
  } catch (const c10::Error&) { // what LibTorch itself checks
  }
  throw FormatError("its state of random numbers is none");
}

} // namespace training

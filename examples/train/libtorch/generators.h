// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/Context.h>
#include <torch/types.h>

#include <mutex>

namespace training {

/// Where the default generator of a device is in its sequence, on the CPU.
inline torch::Tensor generator_state(torch::Device device) {
  auto generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

/// Lets the default generator of a device go on from there.
inline void set_generator_state(
    torch::Device device,
    const torch::Tensor& state) {
  auto generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state.cpu());
}

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/engines.h"
#include "revnet/captured_step.h"
#include "support/autocast_guard.h"

#include <memcnn/allocation_meter.h>
#include <memcnn/exact_range.h>

#include <ATen/core/Tensor.h>
#include <torch/cuda.h>

#include <chrono>
#include <cstdint>

namespace benchmark {

/// One step in seconds.
struct StepTime {
  double step = 0;
  double forward = 0; // and the loss; a replay is not parted
  double backward = 0;
  /// How long the program itself was busy: on a GPU, the time that it took to
  /// hand over all kernels, without waiting for the last of them. Where it is
  /// close to the step's time, the GPU has waited for kernels, and a smaller
  /// number of them, or larger ones, would help.
  double enqueue = 0;
};

/// Tensor memory of one step in bytes, beyond what was held before it.
struct StepMemory {
  int64_t saved = 0; // after forward and loss
  int64_t peak = 0; // at any time, gradients of parameters included
  int64_t left = 0; // after the step: these gradients, and nothing more
};

inline at::Tensor loss_of(const Halves& outputs) {
  // One after the other: C++ leaves the order of two operands open, backward
  // takes the later one first, and the peak of a step depends on that.
  const at::Tensor first = outputs[0].square().mean();
  return first + outputs[1].square().mean();
}

/// Forward and loss.
inline at::Tensor run(const Engine& engine, const at::Tensor& image) {
  const support::AutocastGuard guard(image.device().type(), engine.autocast);
  return loss_of(engine.forward(image));
}

using Clock = std::chrono::steady_clock;

/// The time at which a device has done all that it was given.
inline Clock::time_point time_of_rest(const at::Device& device) {
  if (device.is_cuda()) {
    torch::cuda::synchronize();
  }
  return Clock::now();
}

inline double seconds(Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

inline StepTime time_step(const Engine& engine, const at::Tensor& image) {
  const auto start = time_of_rest(image.device());
  const at::Tensor loss = run(engine, image);
  const auto forward_given = Clock::now();
  const auto middle = time_of_rest(image.device());
  loss.backward();
  const auto backward_given = Clock::now();
  const auto end = time_of_rest(image.device());
  return {
      seconds(end - start),
      seconds(middle - start),
      seconds(end - middle),
      seconds((forward_given - start) + (backward_given - middle))};
}

inline StepTime time_replay(revnet::CapturedStep& step, at::Device device) {
  StepTime time;
  const auto start = time_of_rest(device);
  step();
  time.enqueue = seconds(Clock::now() - start);
  time.step = seconds(time_of_rest(device) - start);
  return time;
}

/// Throws:   c10::ValueError if a value leaves the range of the exact mode.
inline StepMemory meter_step(const Engine& engine, const at::Tensor& image) {
  StepMemory memory;
  const memcnn::AllocationMeter meter(image.device().type());
  {
    const at::Tensor loss = run(engine, image);
    memory.saved = meter.held_bytes();
    loss.backward();
  }
  memory.peak = meter.peak_bytes();
  memory.left = meter.held_bytes();
  memcnn::check_exact_range(image.device());
  return memory;
}

} // namespace benchmark

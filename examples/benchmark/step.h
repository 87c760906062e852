// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/engines.h"

#include <memcnn/allocation_meter.h>

#include <ATen/core/Tensor.h>
#include <torch/cuda.h>

#include <chrono>
#include <cstdint>

namespace benchmark {

/// One step in seconds.
struct StepTime {
  double forward = 0; // and the loss
  double backward = 0;
  /// How long the program itself was busy: on a GPU, the time that it took to
  /// hand over all kernels, without waiting for the last of them. Where it is
  /// close to the step's time, the GPU has waited for kernels, and a smaller
  /// number of them, or larger ones, would help.
  double enqueue = 0;

  double step() const {
    return forward + backward;
  }
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

inline StepTime time_step(const Engine& engine, const at::Tensor& image) {
  using Clock = std::chrono::steady_clock;
  const auto now = [&] {
    if (image.is_cuda()) {
      torch::cuda::synchronize();
    }
    return Clock::now();
  };
  const auto seconds = [](Clock::duration duration) {
    return std::chrono::duration<double>(duration).count();
  };
  const auto start = now();
  const at::Tensor loss = loss_of(engine.forward(image));
  const auto forward_given = Clock::now();
  const auto middle = now();
  loss.backward();
  const auto backward_given = Clock::now();
  const auto end = now();
  return {
      seconds(middle - start),
      seconds(end - middle),
      seconds((forward_given - start) + (backward_given - middle))};
}

inline StepMemory meter_step(const Engine& engine, const at::Tensor& image) {
  StepMemory memory;
  const memcnn::AllocationMeter meter(image.device().type());
  {
    const at::Tensor loss = loss_of(engine.forward(image));
    memory.saved = meter.held_bytes();
    loss.backward();
  }
  memory.peak = meter.peak_bytes();
  memory.left = meter.held_bytes();
  return memory;
}

} // namespace benchmark

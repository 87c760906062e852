// SPDX-License-Identifier: MIT
#pragma once

#include "support/median.h"

#include <memcnn/allocation_meter.h>

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <torch/cuda.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

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

/// One step on a device; `run` is forward and loss.
template <class Run>
StepTime time_step(const Run& run, const at::Device& device) {
  const auto start = time_of_rest(device);
  const at::Tensor loss = run();
  const auto forward_given = Clock::now();
  const auto middle = time_of_rest(device);
  loss.backward();
  const auto backward_given = Clock::now();
  const auto end = time_of_rest(device);
  return {
      seconds(end - start),
      seconds(middle - start),
      seconds(end - middle),
      seconds((forward_given - start) + (backward_given - middle))};
}

/// Likewise, in bytes.
template <class Run>
StepMemory meter_step(const Run& run, const at::Device& device) {
  StepMemory memory;
  const memcnn::AllocationMeter meter(device.type());
  {
    const at::Tensor loss = run();
    memory.saved = meter.held_bytes();
    loss.backward();
  }
  memory.peak = meter.peak_bytes();
  memory.left = meter.held_bytes();
  return memory;
}

/// The median of one member of the times, a value or a function.
template <class Member>
double median_of(const std::vector<StepTime>& times, Member member) {
  std::vector<double> values;
  for (const StepTime& time : times) {
    values.push_back(std::invoke(member, time));
  }
  return support::median(std::move(values));
}

/// The median over rounds of the step by that of `plain` in the same round.
inline double ratio_of(
    const std::vector<StepTime>& times,
    const std::vector<StepTime>& plain) {
  std::vector<double> ratios;
  for (size_t i = 0; i < times.size(); ++i) {
    ratios.push_back(times[i].step / plain[i].step);
  }
  return support::median(std::move(ratios));
}

/// (2 f + b) / (f + b), with plain's forward and backward times: the least that
/// running every block again to its end can take.
inline double fused_limit_of(const std::vector<StepTime>& plain) {
  const double forward = median_of(plain, &StepTime::forward);
  const double backward = median_of(plain, &StepTime::backward);
  return (2 * forward + backward) / (forward + backward);
}

} // namespace benchmark

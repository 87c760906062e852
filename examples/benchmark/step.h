// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/engines.h"
#include "benchmark/step_measures.h"
#include "revnet/captured_step.h"
#include "support/autocast_guard.h"

#include <memcnn/exact_range.h>

#include <ATen/core/Tensor.h>

namespace benchmark {

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

inline StepTime time_step(const Engine& engine, const at::Tensor& image) {
  return time_step([&] { return run(engine, image); }, image.device());
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
  const auto memory =
      meter_step([&] { return run(engine, image); }, image.device());
  memcnn::check_exact_range(image.device());
  return memory;
}

} // namespace benchmark

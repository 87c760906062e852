// SPDX-License-Identifier: MIT
#pragma once

#include "train/step/figures.h"
#include "train/step/step_result.h"

#include <torch/types.h>

#include <cmath>
#include <cstdint>

namespace training {

/// What steps add up to, kept by their device: the figures of every step up to
/// the first whose loss is not finite.
class DeviceTally final {
 public:
  explicit DeviceTally(torch::Device device)
      : state_(torch::zeros({5}, torch::kFloat64).to(device)),
        sums_(state_.narrow(0, 0, 4)),
        last_loss_(state_.narrow(0, 4, 1)),
        one_(torch::ones({1}, state_.options())) {}

  /// Adds figures_of() a step, by operators that a graph can capture. Returns
  /// a float32 scalar: 1 where this step must change nothing, else 0.
  torch::Tensor add(const torch::Tensor& figures) {
    torch::where_out(
        last_loss_, last_loss_.isfinite(), figures.narrow(0, 0, 1), last_loss_);
    const torch::Tensor is_bad = last_loss_.isfinite().logical_not();
    sums_.add_(torch::cat({one_, figures}).masked_fill(is_bad, 0));
    return is_bad.to(torch::kFloat32).squeeze(0);
  }

  /// Waits for the device, and begins anew.
  StepReport read() {
    const torch::Tensor values =
        state_.to(torch::kCPU, /*non_blocking=*/false, /*copy=*/true);
    state_.zero_();
    const auto* value = values.const_data_ptr<double>();
    StepReport report;
    report.sums.steps = static_cast<int64_t>(value[0]);
    report.sums.loss = value[1];
    report.sums.hits = hits_of(values.narrow(0, 1, 3));
    if (!std::isfinite(value[4])) {
      report.bad_loss = value[4];
    }
    return report;
  }

 private:
  torch::Tensor state_; // (5), float64
  torch::Tensor sums_; // (4) of it: steps, and the figures of figures_of()
  torch::Tensor last_loss_; // (1) of it: once not finite, that of then
  torch::Tensor one_;
};

} // namespace training

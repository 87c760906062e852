// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/step_measures.h"

#include <memcnn/kept_activations.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace benchmark {

/// Largest relative error of gradients that still counts as agreement, as in
/// float32. Deep networks in float16 and bfloat16 are further off.
inline constexpr double kGradientTolerance = 1e-3;

/// What is known of one engine in the end.
struct Measurement {
  std::string engine;
  std::string budget; // as it was asked for; empty for an engine without one
  std::string error; // why there is nothing else; empty if there is

  int64_t parameters = 0;
  double grad_norm_first = 0; // of the first convolution of the first F
  std::optional<double> grad_rel_error; // to the plain engine's gradients
  int64_t bn_updates = 0; // of the first normalisation, in one step
  StepMemory memory;
  std::optional<int64_t> budget_bytes;
  std::optional<memcnn::KeptActivations> kept;
  std::optional<int64_t> graph_bytes; // what a graph has for itself

  std::vector<StepTime> times; // one a round
  std::optional<double> ratio_to_plain; // median over the rounds
  std::optional<double> fused_limit; // the same for every engine

  std::string name() const {
    return budget.empty() ? engine : engine + " " + budget;
  }

  bool failed() const {
    return !error.empty();
  }

  bool grad_agrees() const {
    return grad_rel_error && *grad_rel_error < kGradientTolerance;
  }
};

} // namespace benchmark

// SPDX-License-Identifier: MIT
#pragma once

#include "memory_use.h"
#include "trainer.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace training {

/// How far a run has come and what it has measured: with the weights, all that
/// a checkpoint has to hold.
struct RunState {
  int64_t iteration = 0; // steps done
  double loss_sum = 0; // over the steps since the last row
  int64_t correct_sum = 0; // likewise
  int64_t steps_since_row = 0;
  double milliseconds_since_row = 0;
  std::vector<double> step_milliseconds; // of every step
  MemoryUse memory; // largest of all steps
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();

  void add(const StepResult& step) {
    ++iteration;
    loss_sum += step.loss;
    correct_sum += step.correct;
    ++steps_since_row;
    milliseconds_since_row += step.milliseconds;
    step_milliseconds.push_back(step.milliseconds);
    memory.include(step.memory);
  }

  /// Median over all steps.
  double milliseconds_per_step() const {
    if (step_milliseconds.empty()) {
      return 0;
    }
    auto times = step_milliseconds;
    const auto middle = times.begin() + static_cast<long>(times.size() / 2);
    std::nth_element(times.begin(), middle, times.end());
    return *middle;
  }
};

} // namespace training

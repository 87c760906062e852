// SPDX-License-Identifier: MIT
#pragma once

#include "support/median.h"
#include "train/run/log.h"
#include "train/step/memory_use.h"
#include "train/step/step_result.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace training {

/// How far a run has come and what it has measured: with the weights, all that
/// a checkpoint has to hold.
struct RunState {
  int64_t iteration = 0; // steps done
  int64_t iterations = 0; // steps in all, as the run is meant to have
  std::vector<int64_t> earlier_iterations; // what that was before
  StepSums since_row; // steps since the last row of the log
  // Of every step; of steps that were read together, their mean.
  std::vector<double> step_milliseconds;
  MemoryUse memory; // largest of all steps
  LogMark log; // the rows so far
  int64_t processes = 1; // that share each batch

  void add(const StepSums& sums) {
    iteration += sums.steps;
    since_row += sums;
    step_milliseconds.insert(
        step_milliseconds.end(),
        static_cast<size_t>(sums.steps),
        sums.milliseconds / static_cast<double>(sums.steps));
    memory.include(sums.memory);
  }

  /// The learning rate falls at shares of the length: a run that is given
  /// another one is none that has had it from the start.
  void change_length(int64_t other) {
    earlier_iterations.push_back(iterations);
    iterations = other;
  }

  /// Median over all steps.
  double milliseconds_per_step() const {
    if (step_milliseconds.empty()) {
      return 0;
    }
    return support::median(step_milliseconds);
  }
};

} // namespace training

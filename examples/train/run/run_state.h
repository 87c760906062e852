// SPDX-License-Identifier: MIT
#pragma once

#include "support/median.h"
#include "train/run/log.h"
#include "train/step/memory_use.h"
#include "train/step/step_result.h"

#include <cstdint>
#include <vector>

namespace training {

/// What the steps since the last row of the log add up to.
struct SinceRow {
  int64_t steps = 0;
  double loss = 0;
  Hits hits;
  double milliseconds = 0;
  double data_milliseconds = 0;
  MemoryUse memory; // largest of these steps

  void add(const StepResult& step) {
    ++steps;
    loss += step.loss;
    hits += step.hits;
    milliseconds += step.milliseconds;
    data_milliseconds += step.data_milliseconds;
    memory.include(step.memory);
  }
};

/// How far a run has come and what it has measured: with the weights, all that
/// a checkpoint has to hold.
struct RunState {
  int64_t iteration = 0; // steps done
  int64_t iterations = 0; // steps in all, as the run is meant to have
  std::vector<int64_t> earlier_iterations; // what that was before
  SinceRow since_row;
  std::vector<double> step_milliseconds; // of every step
  MemoryUse memory; // largest of all steps
  LogMark log; // the rows so far

  void add(const StepResult& step) {
    ++iteration;
    since_row.add(step);
    step_milliseconds.push_back(step.milliseconds);
    memory.include(step.memory);
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

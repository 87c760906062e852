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

  /// Median over all steps.
  double milliseconds_per_step() const {
    if (step_milliseconds.empty()) {
      return 0;
    }
    return support::median(step_milliseconds);
  }
};

} // namespace training

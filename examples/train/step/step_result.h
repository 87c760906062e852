// SPDX-License-Identifier: MIT
#pragma once

#include "train/step/memory_use.h"

#include <cstdint>
#include <optional>
#include <vector>

namespace training {

/// How many images of a batch were classified right.
struct Hits {
  int64_t first = 0; // the class with the highest logit is the right one
  int64_t top5 = 0; // the right one is among the five highest

  Hits& operator+=(const Hits& other) {
    first += other.first;
    top5 += other.top5;
    return *this;
  }
};

/// What some training steps add up to.
struct StepSums {
  int64_t steps = 0;
  double loss = 0; // of means over a batch
  Hits hits;
  double milliseconds = 0;
  double data_milliseconds = 0; // of these, waiting for batches
  MemoryUse memory; // largest of these steps

  StepSums& operator+=(const StepSums& other) {
    steps += other.steps;
    loss += other.loss;
    hits += other.hits;
    milliseconds += other.milliseconds;
    data_milliseconds += other.data_milliseconds;
    memory.include(other.memory);
    return *this;
  }
};

/// What training steps have to tell.
struct StepReport {
  StepSums sums; // of the steps that changed the weights
  std::optional<double> bad_loss; // of the next, not finite, which changed none
};

/// What the test images of one class have to tell.
struct ClassResult {
  int64_t images = 0;
  int64_t hits = 0; // of the highest logit

  double accuracy() const {
    return static_cast<double>(hits) / static_cast<double>(images);
  }
};

/// What the test images have to tell.
struct Evaluation {
  double loss = 0; // mean over the images
  double accuracy = 0; // 0 to 1
  double top5 = 0; // likewise
  std::vector<ClassResult> classes; // by number
  std::optional<int64_t> not_finite_from; // first image of the first such batch
};

} // namespace training

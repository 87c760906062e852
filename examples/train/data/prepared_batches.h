// SPDX-License-Identifier: MIT
#pragma once

#include "train/data/batches.h"

#include <array>
#include <cstdint>
#include <future>
#include <utility>

namespace training {

/// Training batches, the next of which is prepared by another thread while the
/// caller computes with this one.
class PreparedBatches {
 public:
  explicit PreparedBatches(TrainingBatches batches)
      : batches_(std::move(batches)),
        slots_{batches_.empty_batch(), batches_.empty_batch()} {}

  PreparedBatches(const PreparedBatches&) = delete;
  PreparedBatches& operator=(const PreparedBatches&) = delete;

  ~PreparedBatches() {
    if (next_.valid()) {
      next_.wait();
    }
  }

  /// The batch of an iteration, and the order to prepare the one after it. The
  /// same memory is filled again two calls later.
  const Batch& at(int64_t iteration) {
    if (!next_.valid() || next_iteration_ != iteration) {
      prepare(iteration);
    }
    next_.get();
    prepare(iteration + 1);
    return slots_[slot_of(iteration)];
  }

 private:
  static size_t slot_of(int64_t iteration) {
    return static_cast<size_t>(iteration % 2);
  }

  void prepare(int64_t iteration) {
    if (next_.valid()) {
      next_.wait();
    }
    next_iteration_ = iteration;
    next_ = std::async(std::launch::async, [this, iteration] {
      batches_.fill(iteration, slots_[slot_of(iteration)]);
    });
  }

  TrainingBatches batches_;
  std::array<Batch, 2> slots_;
  int64_t next_iteration_ = 0;
  std::future<void> next_;
};

} // namespace training

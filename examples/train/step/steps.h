// SPDX-License-Identifier: MIT
#pragma once

#include "train/data/batches.h"
#include "train/step/step_result.h"

#include <cstdint>

namespace training {

/// How training steps run, one after the other.
class Steps {
 public:
  virtual ~Steps() = default;

  /// Learns from the batch of an iteration, now or when its device gets to it.
  /// A step whose loss is not finite changes no weights, nor does any after it.
  virtual void step(int64_t iteration) = 0;

  /// What the steps since the last call have to tell, once they are done.
  virtual StepReport read() = 0;

  /// Whether steps are queued, so that read() waits.
  virtual bool run_ahead() const = 0;

  /// The batch of an iteration once more, to look into what it did.
  virtual Batch batch(int64_t iteration) = 0;
};

} // namespace training

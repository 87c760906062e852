// SPDX-License-Identifier: MIT
#pragma once

#include "train/run/run_state.h"

#include <nlohmann/json.hpp>

namespace training {

/// A time or a size as a number; null where none was measured.
template <class Number>
nlohmann::ordered_json measured(Number value) {
  return value > 0 ? nlohmann::ordered_json(value) : nullptr;
}

/// What a step of a run takes, as results have it.
inline nlohmann::ordered_json step_figures(const RunState& state) {
  return {
      {"median_ms_per_step", measured(state.milliseconds_per_step())},
      {"held_after_forward_bytes", measured(state.memory.held_after_forward)},
      {"peak_of_the_step_bytes", measured(state.memory.peak)}};
}

} // namespace training

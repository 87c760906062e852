// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/config.h"
#include "train/numerics/numerics.h"

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <vector>

namespace training {

/// What a deviation may be before a run says that something is wrong.
struct NumericsLimits {
  double inverse_error;
  double gradient_deviation;
};

/// docs/numerics.md has the measurements behind these.
inline NumericsLimits numerics_limits(bool autocast) {
  // In float32 a hundred times the inverse errors, and ten times the deviations
  // of gradients, that the program's networks show. In bfloat16 rounding alone
  // is worth more: there the limit is where nothing is left of a value.
  return autocast ? NumericsLimits{0.5, 1} : NumericsLimits{1e-3, 5e-2};
}

/// What to tell the user, one sentence for each limit that is exceeded.
inline std::vector<std::string> warnings_of(
    const NumericsReport& report,
    const Config& config,
    int64_t iteration) {
  const NumericsLimits limits = numerics_limits(config.amp);
  const char* cure = config.amp ? "Give no --amp, or a lower"
      : config.fractional_bits  ? "Give a lower"
                                : "Give --fractional-bits 14, with which "
                                  "blocks are undone exactly, or a lower";
  std::vector<std::string> warnings;
  const auto compare =
      [&](const char* what, const Deviation& found, double limit) {
        if (found.relative <= limit) { // NaN is not
          return;
        }
        warnings.push_back(fmt::format(
            "expected {} to be off by at most {:g} of its size, but got "
            "{:g} at {} after iteration {}. {} --learning-rate (now {:g}).",
            what,
            limit,
            found.relative,
            found.name,
            iteration,
            cure,
            config.learning_rate));
      };
  compare(
      "the rebuilt input of a block", report.inverse(), limits.inverse_error);
  compare("a gradient", report.gradient, limits.gradient_deviation);
  return warnings;
}

} // namespace training

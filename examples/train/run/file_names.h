// SPDX-License-Identifier: MIT
#pragma once

#include <string_view>

namespace training {

// Of a results directory, beside checkpoints and log.

inline constexpr const char* kRunName = "run.json"; // what a run is
inline constexpr const char* kResultsName = "results.json"; // what it came to
/// Of both.
inline constexpr std::string_view kResultsStart = "{\n  \"config\": {";

} // namespace training

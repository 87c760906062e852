// SPDX-License-Identifier: MIT
#pragma once

#include "support/nearest.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

namespace support {

/// A name that an option has in other programs, and what stands for it here.
struct Synonym {
  std::string_view asked;
  std::string_view option;
  std::string_view remark = ""; // where the option alone would mislead
};

inline constexpr Synonym kSynonyms[] = {
    {"lr", "learning-rate"},
    {"wd", "weight-decay"},
    {"bs", "batch-size"},
    {"bs", "batch"},
    {"batch-size", "batch"},
    {"iters", "iterations"},
    {"iters", "steps"},
    {"iterations", "steps"},
    {"max-steps", "iterations"},
    {"epochs",
     "iterations",
     "did you mean --iterations? One is a batch, not all images"},
    {"weights", "load-weights"},
    {"log-interval", "log-every"},
    {"print-freq", "log-every"},
    {"output-dir", "results-dir"},
    {"workers", "threads"},
    {"bf16", "amp"},
    {"fp16", "amp"},
    {"cpu", "no-cuda"},
    {"cpu", "device"},
    {"cuda", "no-cuda", "a GPU is used where there is one, but with --no-cuda"},
    {"gpu", "no-cuda", "a GPU is used where there is one, but with --no-cuda"},
    {"cuda", "device"},
    {"gpu", "device"},
    {"device",
     "no-cuda",
     "a GPU is used where there is one, but with --no-cuda"},
    {"resume",
     "fresh",
     "a run goes on from its checkpoint by itself, but with --fresh"}};

/// A name without the dashes before it.
inline std::string_view bare(std::string_view name) {
  name.remove_prefix(std::min(name.find_first_not_of('-'), name.size()));
  return name;
}

/// What to put behind an unknown name in a message: what it is called here, else
/// a question for the nearest. Empty where nothing is near.
inline std::string hint_on_name(
    const std::string& asked,
    const std::vector<std::string>& names) {
  for (const Synonym& synonym : kSynonyms) {
    if (synonym.asked != bare(asked)) {
      continue;
    }
    for (const std::string& name : names) {
      if (bare(name) == synonym.option) {
        return synonym.remark.empty() ? fmt::format(" (did you mean {}?)", name)
                                      : fmt::format(" ({})", synonym.remark);
      }
    }
  }
  return did_you_mean(asked, names);
}

} // namespace support

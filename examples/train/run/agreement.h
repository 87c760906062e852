// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/checksum.h"
#include "train/base/config.h"
#include "train/run/as_argument.h"
#include "train/team/team.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// What all processes of a run must have alike, before the first of them does
// anything that would make another wait.

namespace training {

namespace detail {

/// But for where files are, and threads, which each machine may have otherwise.
inline nlohmann::ordered_json common_settings(const Config& config) {
  nlohmann::ordered_json settings = recipe(config);
  settings.update(nlohmann::ordered_json{
      {"load_weights", config.load_weights},
      {"no_cuda", !config.use_cuda},
      {"backend", config.backend},
      {"deterministic", config.deterministic},
      {"log_every", config.log_every},
      {"evaluate_every", config.evaluate_every},
      {"test_images", config.test_images},
      {"checkpoint_every", config.checkpoint_every},
      {"check_inverse", config.check_inverse}});
  return settings;
}

} // namespace detail

/// Throws:   SharedError if a process was given other options than the leader.
inline void agree_on_options(const Config& config, Team& team) {
  const auto all = team.from_all(detail::common_settings(config).dump());
  const auto expected = nlohmann::ordered_json::parse(all[0]);
  for (size_t rank = 1; rank < all.size(); ++rank) {
    const auto found = nlohmann::ordered_json::parse(all[rank]);
    for (const auto& [key, value] : expected.items()) {
      if (found.at(key) != value) {
        throw SharedError(fmt::format(
            "expected the same options for all processes, but rank 0 has {} and "
            "rank {} has {}. Start them with one command.",
            as_argument(key, value),
            rank,
            as_argument(key, found.at(key))));
      }
    }
  }
}

/// Of a size that is everyone's: only then all say the same of it.
///
/// Throws:   SharedError if the processes cannot share a batch.
inline void check_batch_size(const Config& config, const Team& team) {
  const int64_t ranks = team.size();
  const int64_t rest = config.batch_size % ranks;
  if (rest != 0) {
    const int64_t less = config.batch_size - rest;
    throw SharedError(fmt::format(
        "expected --batch-size to be divisible by the {} processes, but got {}. "
        "Give {}, or start another number of processes.",
        ranks,
        config.batch_size,
        less > 0 ? fmt::format("{} or {}", less, less + ranks)
                 : fmt::to_string(ranks)));
  }
}

/// Throws:   SharedError if a process has read other images than the leader.
inline void
agree_on_images(const Config& config, uint32_t fingerprint, Team& team) {
  const auto all = team.from_all(checksum_text(fingerprint));
  for (size_t rank = 1; rank < all.size(); ++rank) {
    if (all[rank] != all[0]) {
      throw SharedError(fmt::format(
          "expected the same images of {} for all processes, but rank 0 has "
          "read some with checksum {} and rank {} with {}. Give each machine the "
          "same files.",
          config.dataset,
          all[0],
          rank,
          all[rank]));
    }
  }
}

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/config.h"
#include "train/team/alone.h"
#include "train/team/launcher.h"
#include "train/team/team.h"

#if defined(MEMCNN_TRAIN_DISTRIBUTED)
#include "train/team/world_team.h"
#endif

#include <fmt/format.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

namespace training {

namespace detail {

#if defined(MEMCNN_TRAIN_DISTRIBUTED)

inline parallel::Backend requested_backend(const Config& config) {
  return config.use_cuda && config.backend == "nccl" ? parallel::Backend::kNccl
      : config.use_cuda && config.backend == "automatic"
      ? parallel::Backend::kAutomatic
      : parallel::Backend::kGloo;
}

inline std::unique_ptr<Team> join_world(const Config& config) {
  const auto world = parallel::World::join(
      parallel::WorldOptions()
          .timeout(std::chrono::seconds(config.peer_timeout))
          .backend(requested_backend(config)));
  const bool on_gpu = config.use_cuda && world.device().is_cuda();
  return std::make_unique<WorldTeam>(
      world, on_gpu ? torch::kCUDA : torch::kCPU);
}

#else

inline std::unique_ptr<Team> join_world(const Config& /*config*/) {
  throw support::Error(
      "expected a program built with the headers of gloo for --distributed, but "
      "they were not found then. Install them (Debian and Ubuntu: apt-get "
      "install libgloo-dev), and configure and build again.");
}

#endif

/// Each restart would do again what is meant to be done once.
inline void check_restarts(const Config& config) {
  if (launcher_number("TORCHELASTIC_MAX_RESTARTS", 0) > 0 &&
      (config.fresh || config.from_previous)) {
    throw SharedError(fmt::format(
        "expected no {} with --max-restarts of torchrun, since every restart "
        "would obey it again. Run once without --max-restarts, or give another "
        "--results-dir.",
        config.fresh ? "--fresh" : "--from-previous"));
  }
}

/// All processes would be rank 0 of a run of their own, in one folder.
inline void check_alone() {
  const int64_t size = launcher_number("WORLD_SIZE", 1);
  if (size > 1) {
    throw SharedError(fmt::format(
        "expected --distributed where several processes are started, but got "
        "WORLD_SIZE {} without it. Give --distributed, or start one process.",
        size));
  }
}

} // namespace detail

/// The processes that a run has, met by this one.
///
/// Throws:   Error if they are not there, or a run of them cannot be what it is
///           asked to be.
inline std::unique_ptr<Team> join_team(const Config& config) {
  if (!config.distributed) {
    detail::check_alone();
    return std::make_unique<Alone>();
  }
  detail::check_restarts(config);
  return detail::join_world(config);
}

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/checksum.h"
#include "train/base/config.h"
#include "train/libtorch/generators.h"
#include "train/run/log.h"
#include "train/run/run_state.h"
#include "train/step/memory_use.h"
#include "train/step/step_result.h"
#include "train/step/trainer.h"

#include <fmt/format.h>
#include <torch/serialize.h>
#include <torch/utils.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <sstream>
#include <string>

namespace training {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Hits, first, top5)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(MemoryUse, held_after_forward, peak)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(LogMark, bytes, checksum)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(
    SinceRow,
    steps,
    loss,
    hits,
    milliseconds,
    data_milliseconds,
    memory)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(
    RunState,
    iteration,
    since_row,
    step_milliseconds,
    memory,
    log)

namespace detail {

/// Refuses a checkpoint that another recipe made.
inline void check_recipe(
    const std::filesystem::path& path,
    const nlohmann::json& found,
    const Config& config) {
  const auto expected = recipe(config);
  for (const auto& [key, value] : expected.items()) {
    const nlohmann::json wanted = value;
    if (!found.contains(key) || found.at(key) != wanted) {
      throw support::Error(fmt::format(
          "expected the checkpoint {} to have {} {}, but got {}. Give "
          "--fresh to overwrite it, or another --results-dir.",
          path.string(),
          key,
          wanted.dump(),
          found.contains(key) ? found.at(key).dump() : "nothing"));
    }
  }
}

/// A shorter run is no part of a longer one: the learning rate falls earlier.
inline void check_length(
    const std::filesystem::path& path,
    const RunState& state,
    const Config& config) {
  if (config.iterations < state.iteration) {
    throw support::Error(fmt::format(
        "expected --iterations to be at least the {} that the checkpoint "
        "{} has done, but got {}. Give --fresh to overwrite it, or another "
        "--results-dir.",
        state.iteration,
        path.string(),
        config.iterations));
  }
}

inline void check_images(
    const std::filesystem::path& path,
    uint32_t expected,
    uint32_t found,
    const Config& config) {
  if (found != expected) {
    throw support::Error(fmt::format(
        "expected the images of {} to be those that the checkpoint {} was "
        "trained on (checksum {}), but got others ({}): a data file has "
        "changed. Restore it, or give --fresh to start anew.",
        config.dataset,
        path.string(),
        checksum_text(expected),
        checksum_text(found)));
  }
}

} // namespace detail

/// All that a run needs to go on as if it had never stopped. `fingerprint` is
/// that of its images.
inline std::string make_checkpoint(
    const Config& config,
    uint32_t fingerprint,
    const RunState& state,
    Trainer& trainer) {
  torch::serialize::OutputArchive archive;
  const nlohmann::json about = {
      {"recipe", recipe(config)}, {"images", fingerprint}, {"state", state}};
  archive.write("about", c10::IValue(about.dump()));
  archive.write("cpu_generator", generator_state(torch::kCPU));
  if (trainer.device().is_cuda()) {
    archive.write("cuda_generator", generator_state(trainer.device()));
  }
  torch::serialize::OutputArchive network;
  trainer.network().save(network);
  archive.write("network", network);
  torch::serialize::OutputArchive optimizer;
  trainer.optimizer().save(optimizer);
  archive.write("optimizer", optimizer);
  std::ostringstream bytes;
  archive.save_to(bytes);
  return bytes.str();
}

/// Goes on from what make_checkpoint() made, and `path` has: fills the trainer
/// and returns the state.
///
/// Throws:   Error if it is of another recipe, of other images, or of a longer
///           run; the trainer is then not to be used.
inline RunState restore_checkpoint(
    const std::string& bytes,
    const std::filesystem::path& path,
    const Config& config,
    uint32_t fingerprint,
    Trainer& trainer) {
  torch::serialize::InputArchive archive;
  std::istringstream stream(bytes);
  archive.load_from(stream, trainer.device());
  c10::IValue text;
  archive.read("about", text);
  const auto about = nlohmann::json::parse(text.toStringRef());
  const auto state = about.at("state").get<RunState>();
  detail::check_length(path, state, config);
  detail::check_recipe(path, about.at("recipe"), config);
  detail::check_images(path, about.at("images"), fingerprint, config);

  torch::serialize::InputArchive network;
  archive.read("network", network);
  trainer.network().load(network);
  torch::serialize::InputArchive optimizer;
  archive.read("optimizer", optimizer);
  trainer.optimizer().load(optimizer);

  torch::Tensor generator;
  archive.read("cpu_generator", generator);
  set_generator_state(torch::kCPU, generator);
  if (trainer.device().is_cuda() &&
      archive.try_read("cuda_generator", generator)) {
    set_generator_state(trainer.device(), generator);
  }
  return state;
}

} // namespace training

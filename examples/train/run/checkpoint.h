// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/config.h"
#include "train/libtorch/generators.h"
#include "train/run/run_state.h"
#include "train/step/trainer.h"

#include <torch/serialize.h>
#include <torch/utils.h>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <sstream>
#include <string>

namespace training {

namespace detail {

inline nlohmann::ordered_json to_json(const MemoryUse& memory) {
  return {
      {"held_after_forward", memory.held_after_forward}, {"peak", memory.peak}};
}

inline MemoryUse memory_from(const nlohmann::ordered_json& json) {
  return {json.at("held_after_forward"), json.at("peak")};
}

inline nlohmann::ordered_json to_json(const RunState& state) {
  const SinceRow& since = state.since_row;
  return {
      {"iteration", state.iteration},
      {"since_row",
       {{"steps", since.steps},
        {"loss", since.loss},
        {"hits", since.hits.first},
        {"top5", since.hits.top5},
        {"milliseconds", since.milliseconds},
        {"data_milliseconds", since.data_milliseconds},
        {"memory", to_json(since.memory)}}},
      {"memory", to_json(state.memory)},
      {"rows", state.rows}};
}

inline RunState state_from(const nlohmann::ordered_json& json) {
  RunState state;
  state.iteration = json.at("iteration");
  const auto& since = json.at("since_row");
  state.since_row.steps = since.at("steps");
  state.since_row.loss = since.at("loss");
  state.since_row.hits = {since.at("hits"), since.at("top5")};
  state.since_row.milliseconds = since.at("milliseconds");
  state.since_row.data_milliseconds = since.at("data_milliseconds");
  state.since_row.memory = memory_from(since.at("memory"));
  state.memory = memory_from(json.at("memory"));
  state.rows = json.at("rows");
  return state;
}

/// Refuses a checkpoint that another recipe made.
inline void check_recipe(
    const std::filesystem::path& path,
    const nlohmann::ordered_json& found,
    const Config& config) {
  const auto expected = recipe(config);
  for (const auto& [key, wanted] : expected.items()) {
    if (!found.contains(key) || found.at(key) != wanted) {
      const std::string got =
          found.contains(key) ? found.at(key).dump() : "nothing";
      throw support::Error(
          "expected the checkpoint " + path.string() + " to have " + key + " " +
          wanted.dump() + ", but got " + got +
          ". Give --fresh to overwrite it, or another --results-dir.");
    }
  }
}

/// A shorter run is no part of a longer one: the learning rate falls earlier.
inline void check_length(
    const std::filesystem::path& path,
    const RunState& state,
    const Config& config) {
  if (config.iterations < state.iteration) {
    throw support::Error(
        "expected --iterations to be at least the " +
        std::to_string(state.iteration) + " that the checkpoint " +
        path.string() + " has done, but got " +
        std::to_string(config.iterations) +
        ". Give --fresh to overwrite it, or another --results-dir.");
  }
}

inline void check_images(
    const std::filesystem::path& path,
    const std::string& expected,
    const std::string& found,
    const Config& config) {
  if (found != expected) {
    throw support::Error(
        "expected the images of " + config.dataset +
        " to be those that the checkpoint " + path.string() +
        " was trained on (checksum " + expected + "), but got others (" +
        found +
        "): a data file has changed. Restore it, or give --fresh to start "
        "anew.");
  }
}

} // namespace detail

/// All that a run needs to go on as if it had never stopped. `fingerprint` is
/// that of its images.
inline std::string make_checkpoint(
    const Config& config,
    const std::string& fingerprint,
    const RunState& state,
    Trainer& trainer) {
  torch::serialize::OutputArchive archive;
  const nlohmann::ordered_json about = {
      {"recipe", recipe(config)},
      {"images", fingerprint},
      {"state", detail::to_json(state)}};
  archive.write("about", c10::IValue(about.dump()));
  archive.write(
      "step_milliseconds",
      torch::tensor(state.step_milliseconds, torch::kFloat64));
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
    const std::string& fingerprint,
    Trainer& trainer) {
  torch::serialize::InputArchive archive;
  std::istringstream stream(bytes);
  archive.load_from(stream, trainer.device());
  c10::IValue text;
  archive.read("about", text);
  const auto about = nlohmann::ordered_json::parse(text.toStringRef());
  RunState state = detail::state_from(about.at("state"));
  detail::check_length(path, state, config);
  detail::check_recipe(path, about.at("recipe"), config);
  detail::check_images(path, about.at("images"), fingerprint, config);

  torch::Tensor times;
  archive.read("step_milliseconds", times);
  times = times.cpu();
  const auto* first = times.const_data_ptr<double>();
  state.step_milliseconds.assign(first, first + times.numel());

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

// SPDX-License-Identifier: MIT
#pragma once

#include "config.h"
#include "error.h"
#include "files.h"
#include "run_state.h"
#include "trainer.h"

#include <ATen/Context.h>
#include <torch/serialize.h>
#include <torch/utils.h>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <mutex>
#include <string>

namespace training {

namespace detail {

inline constexpr int kCheckpointFormat = 1;

inline torch::Tensor generator_state(torch::Device device) {
  auto generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

inline void set_generator_state(
    torch::Device device,
    const torch::Tensor& state) {
  auto generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state.cpu());
}

inline nlohmann::ordered_json to_json(const RunState& state) {
  return {
      {"iteration", state.iteration},
      {"loss_sum", state.loss_sum},
      {"correct_sum", state.correct_sum},
      {"steps_since_row", state.steps_since_row},
      {"milliseconds_since_row", state.milliseconds_since_row},
      {"held_after_forward", state.memory.held_after_forward},
      {"peak", state.memory.peak},
      {"rows", state.rows}};
}

inline RunState from_json(const nlohmann::ordered_json& json) {
  RunState state;
  state.iteration = json.at("iteration");
  state.loss_sum = json.at("loss_sum");
  state.correct_sum = json.at("correct_sum");
  state.steps_since_row = json.at("steps_since_row");
  state.milliseconds_since_row = json.at("milliseconds_since_row");
  state.memory.held_after_forward = json.at("held_after_forward");
  state.memory.peak = json.at("peak");
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
      throw Error(
          "expected the checkpoint " + path.string() + " to have " + key + " " +
          wanted.dump() + ", but got " + got +
          ". Give --fresh to overwrite it, or another --results-dir.");
    }
  }
}

} // namespace detail

/// Writes all that a run needs to go on as if it had never stopped.
inline void save_checkpoint(
    const std::filesystem::path& path,
    const Config& config,
    const RunState& state,
    Trainer& trainer) {
  torch::serialize::OutputArchive archive;
  const nlohmann::ordered_json about = {
      {"format", detail::kCheckpointFormat},
      {"recipe", recipe(config)},
      {"state", detail::to_json(state)}};
  archive.write("about", c10::IValue(about.dump()));
  archive.write(
      "step_milliseconds",
      torch::tensor(state.step_milliseconds, torch::kFloat64));
  archive.write("cpu_generator", detail::generator_state(torch::kCPU));
  if (trainer.device().is_cuda()) {
    archive.write("cuda_generator", detail::generator_state(trainer.device()));
  }
  torch::serialize::OutputArchive network;
  trainer.network().save(network);
  archive.write("network", network);
  torch::serialize::OutputArchive optimizer;
  trainer.optimizer().save(optimizer);
  archive.write("optimizer", optimizer);
  write_atomically(
      path, [&](const std::string& partial) { archive.save_to(partial); });
}

/// Goes on from a checkpoint: fills the trainer and returns the state.
///
/// Throws:   Error if the file is no checkpoint or one of another recipe; the
///           trainer is then not to be used.
inline RunState load_checkpoint(
    const std::filesystem::path& path,
    const Config& config,
    Trainer& trainer) {
  try {
    torch::serialize::InputArchive archive;
    archive.load_from(path.string(), trainer.device());
    c10::IValue text;
    archive.read("about", text);
    const auto about = nlohmann::ordered_json::parse(text.toStringRef());
    detail::check_recipe(path, about.at("recipe"), config);

    RunState state = detail::from_json(about.at("state"));
    torch::Tensor times;
    archive.read("step_milliseconds", times);
    times = times.cpu();
    const auto* first = times.data_ptr<double>();
    state.step_milliseconds.assign(first, first + times.numel());

    torch::serialize::InputArchive network;
    archive.read("network", network);
    trainer.network().load(network);
    torch::serialize::InputArchive optimizer;
    archive.read("optimizer", optimizer);
    trainer.optimizer().load(optimizer);

    torch::Tensor generator;
    archive.read("cpu_generator", generator);
    detail::set_generator_state(torch::kCPU, generator);
    if (trainer.device().is_cuda() &&
        archive.try_read("cuda_generator", generator)) {
      detail::set_generator_state(trainer.device(), generator);
    }
    return state;
  } catch (const Error&) {
    throw;
  } catch (const std::exception&) {
    throw Error(
        "expected " + path.string() +
        " to be a checkpoint of this program, but it cannot be read. Give "
        "--fresh to overwrite it, or another --results-dir.");
  }
}

} // namespace training

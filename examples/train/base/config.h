// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/run_settings.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <optional>
#include <string>

namespace training {

/// Every setting of a run. Defaults are the recipe of the residual networks'
/// authors for CIFAR (He et al. 2016, arXiv:1603.05027), as Python MemCNN has
/// it.
struct Config : RunSettings {
  Config() {
    iterations = 80000; // about 160 passes over 50,000 images
    batch_size = 100; // small enough for the noise that regularises
    learning_rate = 0.1; // divided by 10 at 1/2 and at 3/4 of the run
  }

  /// learning_rate_at() depends on how many iterations there are in all.
  static constexpr bool kRateFollowsLength = true;

  std::string model; // one of model_names() in network.h

  // The recipe. A checkpoint goes on only under the same one.
  double momentum = 0.9; // lets so high a rate be stable
  double weight_decay = 2e-4; // on every parameter, as the authors have it
  std::optional<int64_t> fractional_bits; // none: rounding takes some time
  int64_t memory_budget = 0; // MiB; 0: the least memory
  bool checkpoint_transitions = true; // 6 % of time for half of what is held
  std::string memory_format = "channels-last"; // a quarter faster, on a CPU

  // Where the run happens. Results do not depend on it, but for rounding.
  std::optional<bool> cuda_graph; // none: on a GPU, where that can be captured
  bool deterministic = false; // the fastest algorithms add in any order

  // Several processes.
  bool distributed = false; // each computes a slice of every batch
  std::string backend = "automatic"; // NCCL if each process has a GPU
  int64_t peer_timeout = 600; // seconds; a full disk may take some

  // What is read and written.
  std::string load_weights; // empty: random ones
  std::string save_weights; // empty: nowhere but in the checkpoint
  int64_t check_inverse = 0; // 0: never; takes as long as a few steps
};

/// The part of a configuration that two runs must share to be one run.
inline nlohmann::ordered_json recipe(const Config& config) {
  nlohmann::ordered_json settings = {
      {"model", config.model},
      {"dataset", config.dataset},
      {"iterations", config.iterations},
      {"batch_size", config.batch_size},
      {"learning_rate", config.learning_rate},
      {"momentum", config.momentum},
      {"weight_decay", config.weight_decay},
      {"seed", config.seed},
      {"engine", config.engine},
      {"fractional_bits",
       config.fractional_bits ? nlohmann::ordered_json(*config.fractional_bits)
                              : nlohmann::ordered_json()},
      {"memory_budget_mib", config.memory_budget},
      {"checkpoint_transitions", config.checkpoint_transitions},
      {"amp", config.amp},
      {"memory_format", config.memory_format}};
  if (!config.load_weights.empty()) {
    settings["load_weights"] = config.load_weights;
  }
  return settings;
}

/// Learning rate of an iteration; iterations count from 0.
inline double learning_rate_at(const Config& config, int64_t iteration) {
  double rate = config.learning_rate;
  if (2 * iteration >= config.iterations) {
    rate /= 10;
  }
  if (4 * iteration >= 3 * config.iterations) {
    rate /= 10;
  }
  return rate;
}

} // namespace training

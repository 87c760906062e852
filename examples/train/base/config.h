// SPDX-License-Identifier: MIT
#pragma once

#include <nlohmann/json.hpp>

#include <cstdint>
#include <optional>
#include <string>

namespace training {

/// Every setting of a run. Defaults are the recipe of the residual networks'
/// authors for CIFAR (He et al. 2016, arXiv:1603.05027), as Python MemCNN has
/// it.
struct Config {
  std::string model; // one of model_names() in network.h
  std::string dataset; // one of dataset_names() in data_set.h

  // The recipe. A checkpoint goes on only under the same one.
  int64_t iterations = 80000; // about 160 passes over 50,000 images
  int64_t batch_size = 100; // small enough for the noise that regularises
  double learning_rate = 0.1; // divided by 10 at 1/2 and at 3/4 of the run
  double momentum = 0.9; // lets so high a rate be stable
  double weight_decay = 2e-4; // on every parameter, as the authors have it
  uint64_t seed = 42; // of weights, order of the images, and augmentation
  std::string engine = "sequence"; // the fastest that saves memory
  std::optional<int64_t> fractional_bits; // none: rounding takes some time
  int64_t memory_budget = 0; // MiB; 0: the least memory
  bool checkpoint_transitions = true; // 6 % of time for half of what is held
  bool amp = false; // in bfloat16, which has float32's range: no loss scaling
  std::string memory_format = "channels-last"; // a quarter faster, on a CPU

  // Where the run happens. Results do not depend on it, but for rounding.
  bool use_cuda = true; // where a device is present
  std::optional<bool> cuda_graph; // none: on a GPU, where that can be captured
  bool deterministic = false; // the fastest algorithms add in any order
  int threads = 0; // 0: one per core that the run has

  // Several processes.
  bool distributed = false; // each computes a slice of every batch
  std::string backend = "automatic"; // NCCL if each process has a GPU
  int64_t peer_timeout = 600; // seconds; a full disk may take some

  // What is read and written.
  std::string data_dir; // empty: where the download targets put the data set
  std::string results_dir; // empty: results/MODEL-DATASET
  bool fresh = false; // overwrites a checkpoint instead of going on from it
  bool from_previous = false; // goes on from the checkpoint before the last
  std::string load_weights; // empty: random ones
  std::string save_weights; // empty: nowhere but in the checkpoint
  int64_t log_every = 20; // a row every few seconds, even on a small CPU
  int64_t evaluate_every = 0; // 0: at the end only; takes as long as 30 steps
  int64_t test_images = 0; // 0: all; fewer for a quick look only
  int64_t checkpoint_every = 500; // at most some minutes are ever lost
  int64_t check_inverse = 0; // 0: never; takes as long as a few steps
  int64_t compare_plain = 0; // steps of each twin; 0: no comparison
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

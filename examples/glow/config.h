// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/run_settings.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdint>
#include <string>

namespace glow {

/// Every setting of a run. Sizes are those of Glow's authors for CIFAR-10
/// (Kingma and Dhariwal 2018, arXiv:1807.03039).
struct Config : training::RunSettings {
  Config() {
    iterations = 100000; // about 130 passes over 50,000 images
    batch_size = 64;
    learning_rate = 1e-3; // as theirs, once warm
  }

  /// learning_rate_at() depends on how many iterations there are in all.
  static constexpr bool kRateFollowsLength = false;

  // The recipe. A checkpoint goes on only under the same one.
  int64_t levels = 3;
  int64_t steps = 32; // in each level
  int64_t width = 512; // channels inside of the branches
  std::string parametrization = "lu"; // one of parametrization_names()
  int64_t anchor_every = 8; // steps; 0: none
  int64_t learn_bits = 8; // of each byte; 5 are those that people see
  int64_t warm_up = 100; // steps in which the learning rate rises
  double clip_norm = 10; // of all gradients; far above those of usual steps

  // What is shown.
  int64_t sample_every = 0; // 0: at the end only; takes as long as a step
  double temperature = 0.7; // of the samples, as in the authors' figures
};

inline nlohmann::ordered_json recipe(const Config& config) {
  return {
      {"model", "glow"},
      {"dataset", config.dataset},
      {"iterations", config.iterations},
      {"batch_size", config.batch_size},
      {"learning_rate", config.learning_rate},
      {"seed", config.seed},
      {"engine", config.engine},
      {"levels", config.levels},
      {"steps", config.steps},
      {"width", config.width},
      {"parametrization", config.parametrization},
      {"anchor_every", config.anchor_every},
      {"learn_bits", config.learn_bits},
      {"warm_up", config.warm_up},
      {"clip_norm", config.clip_norm},
      {"amp", config.amp}};
}

/// Learning rate of an iteration; iterations count from 0.
inline double learning_rate_at(const Config& config, int64_t iteration) {
  const int64_t warm_up = std::max<int64_t>(config.warm_up, 1);
  return config.learning_rate *
      static_cast<double>(std::min(iteration + 1, warm_up)) /
      static_cast<double>(warm_up);
}

/// The configuration of the same flow under plain autograd.
inline Config plain_twin(Config config) {
  config.engine = "plain";
  return config;
}

/// Whether memcnn::PlainAutogradGuard is to run a configuration's flow.
inline bool is_plain(const Config& config) {
  return config.engine == "plain";
}

} // namespace glow

// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/interrupt.h"
#include "train/team/team.h"

#include <torch/nn/module.h>
#include <torch/types.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace training {

/// One process, which has nobody to wait for.
class Alone final : public Team {
 public:
  int64_t rank() const override {
    return 0;
  }

  int64_t size() const override {
    return 1;
  }

  std::string backend() const override {
    return "";
  }

  int stop_signal() const override {
    return interrupted();
  }

  bool is_of_lost_process(const std::exception& /*error*/) const override {
    return false;
  }

  std::unique_ptr<GradientAverage> average_gradients(
      torch::nn::Module& /*network*/) override {
    return std::make_unique<OwnGradients>();
  }

  Pending begin_sum(const torch::Tensor& values) override {
    return [values] {
      return values;
    };
  }

  std::string from_leader(const std::string& bytes) override {
    return bytes;
  }

  std::vector<std::string> from_all(const std::string& bytes) override {
    return {bytes};
  }

 private:
  /// Those of the process are those of the batch.
  class OwnGradients final : public GradientAverage {
   public:
    torch::Tensor forward(const std::function<torch::Tensor()>& run) override {
      return run();
    }

    void share_buffers() override {}

    int64_t standing_bytes() const override {
      return 0;
    }
  };
};

/// What trains where nothing else is said.
inline Team& alone() {
  static Alone team;
  return team;
}

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include "revnet/revnet.h"
#include "train/libtorch/generators.h"

#include <torch/types.h>

#include <memory>
#include <utility>
#include <vector>

namespace training {

/// The default generators that a network on a device can draw from, as they are
/// found; put back at the end of scope.
class GeneratorsAsFound final {
 public:
  explicit GeneratorsAsFound(torch::Device device) {
    note(torch::kCPU);
    if (!device.is_cpu()) {
      note(device);
    }
  }

  ~GeneratorsAsFound() {
    rewind();
  }

  GeneratorsAsFound(const GeneratorsAsFound&) = delete;
  GeneratorsAsFound& operator=(const GeneratorsAsFound&) = delete;

  /// Lets them draw the same numbers again.
  void rewind() {
    for (const auto& [device, state] : found_) {
      set_generator_state(device, state);
    }
  }

 private:
  void note(torch::Device device) {
    found_.emplace_back(device, generator_state(device));
  }

  std::vector<std::pair<torch::Device, torch::Tensor>> found_;
};

/// A network to try things on: a deep copy in train mode, or in eval mode, with
/// weights, running statistics and engine of the original, which never learns of
/// it. What the copy draws from the default generators is undone at the end of
/// scope.
///
/// Memory:   parameters and buffers once more.
class TrialCopy final {
 public:
  TrialCopy(
      const revnet::RevNetImpl& network,
      torch::Device device,
      bool training = true)
      : generators_(device),
        network_(
            std::dynamic_pointer_cast<revnet::RevNetImpl>(network.clone())) {
    network_->train(training);
    // Making the copy's weights, before they are overwritten, draws numbers.
    generators_.rewind();
  }

  revnet::RevNetImpl& network() {
    return *network_;
  }

  /// Lets the next trial draw the numbers that this one drew.
  void rewind_generators() {
    generators_.rewind();
  }

 private:
  GeneratorsAsFound generators_;
  std::shared_ptr<revnet::RevNetImpl> network_;
};

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include "revnet/fused_sgd.h"
#include "revnet/revnet.h"
#include "support/autocast_guard.h"
#include "train/base/config.h"
#include "train/data/batches.h"
#include "train/step/figures.h"
#include "train/step/loss.h"
#include "train/step/memory_use.h"
#include "train/step/network.h"
#include "train/team/team.h"

#include <torch/nn.h>
#include <torch/optim/sgd.h>

#include <cstdint>
#include <memory>

namespace training {

namespace detail {

/// The network, moved there.
template <class Network>
Network moved_to(torch::Device device, Network network) {
  network.ptr()->to(device);
  return network;
}

inline torch::optim::SGDOptions optimizer_options(const Config& config) {
  return torch::optim::SGDOptions(config.learning_rate)
      .momentum(config.momentum)
      .weight_decay(config.weight_decay);
}

} // namespace detail

/// A network on a device, and the optimizer of its weights: what a step changes.
class Learner final {
 public:
  struct Forward {
    torch::Tensor loss; // mean over the batch
    torch::Tensor hits; // of ranked_hits()
  };

  Learner(
      const Config& config,
      int64_t num_classes,
      torch::Device device,
      Team& team)
      : config_(config),
        device_(device),
        team_(team),
        network_(detail::moved_to(
            device,
            make_network(config, num_classes, team.size()))),
        average_(team.average_gradients(network())),
        optimizer_(network().parameters(), detail::optimizer_options(config)) {}

  Learner(const Learner&) = delete;
  Learner& operator=(const Learner&) = delete;

  /// What a step of this iteration needs, beside its batch.
  void prepare_step(int64_t iteration) {
    network().train();
    const double rate = learning_rate_at(config_, iteration);
    if (rate != optimizer_.lr()) {
      optimizer_.set_lr(rate);
    }
    if (!device_.is_cpu()) { // else signals come with the figures
      team_.meet();
    }
  }

  Forward forward(const Batch& batch) {
    const support::AutocastGuard autocast(device_.type(), config_.amp);
    const torch::Tensor logits =
        network_->forward(batch.images).to(torch::kFloat32);
    return {loss_of(logits, batch.labels), ranked_hits(logits, batch.labels)};
  }

  /// Forward and backward of this process' slice. Returns figures_of() the whole
  /// batch; the gradients, of the parameters, are its, too.
  torch::Tensor forward_and_backward(const Batch& slice, MemoryWatch& memory) {
    Forward found;
    average_->forward([&] {
      found = forward(slice);
      return found.loss;
    });
    memory.note_end_of_forward();
    torch::Tensor figures = figures_of(found.loss, found.hits);
    if (team_.size() > 1) { // whose slices are of one size
      figures[0] /= team_.size();
    }
    const Team::Pending of_all = team_.begin_sum(figures);
    found.loss.backward();
    return of_all();
  }

  /// Memory that gradients take from step to step.
  int64_t standing_gradients() const {
    return average_->standing_bytes();
  }

  /// Gives all processes the running statistics of the leader, which are those
  /// that its checkpoint has.
  void share_buffers() {
    average_->share_buffers();
  }

  Team& team() const {
    return team_;
  }

  revnet::RevNetImpl& network() const {
    return *network_.ptr();
  }

  revnet::FusedSgd& optimizer() {
    return optimizer_;
  }

  torch::Device device() const {
    return device_;
  }

 private:
  Config config_;
  torch::Device device_;
  Team& team_;
  revnet::RevNet network_;
  std::unique_ptr<GradientAverage> average_;
  revnet::FusedSgd optimizer_;
};

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"

#include <torch/nn/module.h>
#include <torch/types.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace training {

/// What all processes of a run say in the same place: one message is enough.
struct SharedError : support::Error {
  using support::Error::Error;
};

/// How the gradients of a network become those of the whole batch.
class GradientAverage {
 public:
  virtual ~GradientAverage() = default;

  /// Runs a forward pass, whose backward pass then averages.
  virtual torch::Tensor forward(const std::function<torch::Tensor()>& run) = 0;

  /// Gives all processes the buffers of the leader.
  virtual void share_buffers() = 0;

  /// Memory that gradients take from step to step.
  virtual int64_t standing_bytes() const = 0;
};

/// The processes that train one network together, each on its slice of every
/// batch; mostly there is one. The one of rank 0 leads: it alone prints, and
/// reads and writes the files of the run.
///
/// Collectives are called by every process, in the same order.
class Team {
 public:
  /// Waits for what was begun, and returns it.
  using Pending = std::function<torch::Tensor()>;

  virtual ~Team() = default;

  virtual int64_t rank() const = 0;
  virtual int64_t size() const = 0;

  bool leads() const {
    return rank() == 0;
  }

  /// What carries gradients from one to the other; empty for one process.
  virtual std::string backend() const = 0;

  /// The signal that asks all to stop, or 0. All know it by the same sum: one
  /// that stopped alone would let the others wait.
  virtual int stop_signal() const = 0;

  /// Whether an error says that another process is gone.
  virtual bool is_of_lost_process(const std::exception& error) const = 0;

  /// A collective: gives all processes the network of the leader, and averages
  /// its gradients from then on.
  virtual std::unique_ptr<GradientAverage> average_gradients(
      torch::nn::Module& network) = 0;

  /// A collective: begins to sum (N) values, float64. Those on the CPU carry
  /// signals along.
  virtual Pending begin_sum(const torch::Tensor& values) = 0;

  /// A collective: the bytes that the leader has.
  virtual std::string from_leader(const std::string& bytes) = 0;

  /// A collective: the bytes that each has, by rank.
  virtual std::vector<std::string> from_all(const std::string& bytes) = 0;

  /// A collective: lets all know of signals, where there is nothing else to tell.
  void meet() {
    if (size() > 1) {
      begin_sum(torch::empty({0}, torch::kFloat64))();
    }
  }
};

} // namespace training

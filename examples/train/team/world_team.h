// SPDX-License-Identifier: MIT
#pragma once

#include "data_parallel.h"
#include "train/base/interrupt.h"
#include "train/team/team.h"

#include <c10/util/Exception.h>
#include <gloo/common/error.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace training {

namespace detail {

/// By c10d's Reducer, while backward runs.
class ReducedGradients final : public GradientAverage {
 public:
  ReducedGradients(torch::nn::Module& network, const parallel::World& world)
      : parallel_(
            network,
            world,
            parallel::DataParallelOptions()
                .gradient_as_bucket_view(true) // else they are there twice
                .broadcast_buffers(false)) { // no training step reads them
    for (const torch::Tensor& parameter : network.parameters()) {
      bytes_ += static_cast<int64_t>(parameter.nbytes());
    }
  }

  torch::Tensor forward(const std::function<torch::Tensor()>& run) override {
    return parallel_.forward(run);
  }

  void share_buffers() override {
    parallel_.broadcast_buffers();
  }

  /// Of the buckets, which gradients are views of.
  int64_t standing_bytes() const override {
    return bytes_;
  }

 private:
  parallel::DataParallel parallel_;
  int64_t bytes_ = 0;
};

} // namespace detail

/// The processes that torchrun started.
class WorldTeam final : public Team {
 public:
  /// They compute on devices of `type`.
  WorldTeam(parallel::World world, torch::DeviceType type)
      : world_(std::move(world)),
        backend_(world_.group->getBackend(type)->getBackendName()) {}

  int64_t rank() const override {
    return world_.rank;
  }

  int64_t size() const override {
    return world_.size;
  }

  std::string backend() const override {
    return backend_;
  }

  int stop_signal() const override {
    return stop_signal_;
  }

  /// Not those of NCCL, which has many reasons of its own. Where that hangs, the
  /// next sum on the CPU tells, which is gloo's.
  bool is_of_lost_process(const std::exception& error) const override {
    return dynamic_cast<const gloo::Exception*>(&error) != nullptr ||
        dynamic_cast<const c10::DistNetworkError*>(&error) != nullptr ||
        dynamic_cast<const c10::DistStoreError*>(&error) != nullptr;
  }

  std::unique_ptr<GradientAverage> average_gradients(
      torch::nn::Module& network) override {
    return std::make_unique<detail::ReducedGradients>(network, world_);
  }

  Pending begin_sum(const torch::Tensor& values) override {
    const bool with_signals = values.is_cpu();
    std::vector<torch::Tensor> sum{
        with_signals ? torch::cat({values, own_signals()}) : values.clone()};
    const auto work = world_.group->allreduce(sum);
    return [this, with_signals, sum = sum[0], work] {
      work->wait();
      if (!with_signals) {
        return sum;
      }
      const int64_t count = sum.numel() - kSignals;
      note_signals(sum.narrow(0, count, kSignals));
      return sum.narrow(0, 0, count);
    };
  }

  std::string from_leader(const std::string& bytes) override {
    return world_.broadcast_bytes(bytes);
  }

  std::vector<std::string> from_all(const std::string& bytes) override {
    return world_.gather_bytes(bytes);
  }

 private:
  static constexpr auto kSignals = static_cast<int64_t>(kStopSignals.size());

  /// 1 for the signal that this process got.
  static torch::Tensor own_signals() {
    torch::Tensor signals = torch::zeros({kSignals}, torch::kFloat64);
    for (size_t i = 0; i < kStopSignals.size(); ++i) {
      signals.data_ptr<double>()[i] = interrupted() == kStopSignals[i] ? 1 : 0;
    }
    return signals;
  }

  /// The first stays, as in one process.
  void note_signals(const torch::Tensor& counts) {
    const auto* count = counts.const_data_ptr<double>();
    for (size_t i = 0; i < kStopSignals.size() && stop_signal_ == 0; ++i) {
      stop_signal_ = count[i] > 0 ? kStopSignals[i] : 0;
    }
  }

  parallel::World world_;
  std::string backend_;
  int stop_signal_ = 0;
};

} // namespace training

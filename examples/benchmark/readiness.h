// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/engines.h"
#include "benchmark/gradients.h"
#include "benchmark/network.h"
#include "benchmark/step.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/nn.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace benchmark {

/// How far backward has come when gradients of parameters are ready: counted in
/// branches, whose number is the same in every run, not in time.
struct Readiness {
  struct Gradient {
    int64_t bytes = 0;
    int64_t branches = 0; // that backward had begun with by then
  };
  std::vector<Gradient> gradients; // in the order in which they came
  int64_t branches = 0; // of the whole backward

  /// The share of the branches that backward has begun with when that share of
  /// the bytes is there. A share is from 0 to 1.
  double branches_at(double share_of_bytes) const {
    int64_t all = 0;
    for (const Gradient& gradient : gradients) {
      all += gradient.bytes;
    }
    int64_t sum = 0;
    for (const Gradient& gradient : gradients) {
      sum += gradient.bytes;
      if (static_cast<double>(sum) >=
          share_of_bytes * static_cast<double>(all)) {
        return static_cast<double>(gradient.branches) /
            static_cast<double>(branches);
      }
    }
    return 1;
  }
};

namespace detail {

/// Returns its input, and counts when backward brings that one's gradient.
struct BackwardCounterImpl final : torch::nn::Module {
  explicit BackwardCounterImpl(std::shared_ptr<int64_t> count_)
      : count(std::move(count_)) {}

  at::Tensor forward(at::Tensor x) {
    if (x.requires_grad()) {
      x.register_hook([count = count](const at::Tensor&) { ++*count; });
    }
    return x;
  }

  std::shared_ptr<int64_t> count;
};
TORCH_MODULE(BackwardCounter);

struct AfterAccumulation final : torch::autograd::PostAccumulateGradHook {
  using Function = std::function<void(const at::Tensor&)>;

  explicit AfterAccumulation(Function function_)
      : function(std::move(function_)) {}
  void operator()(const at::Tensor& parameter) override {
    function(parameter);
  }

  Function function;
};

} // namespace detail

/// Counts in the branches of a network. Make one before its engines.
class ReadinessMeter final {
 public:
  explicit ReadinessMeter(Network<Additive>& network)
      : parameters_(network.parameters()) {
    for (Additive& block : network.blocks) {
      block->f->push_back(detail::BackwardCounter(branches_));
      block->g->push_back(detail::BackwardCounter(branches_));
    }
  }

  /// One step of an engine, which leaves no gradients.
  Readiness measure(const Engine& engine, const at::Tensor& image) {
    Readiness readiness;
    *branches_ = 0;
    forget_gradients(parameters_);
    set_hooks([&](const at::Tensor& parameter) {
      const auto bytes = static_cast<int64_t>(parameter.nbytes());
      readiness.gradients.push_back({bytes, *branches_});
    });
    run(engine, image).backward();
    readiness.branches = *branches_;
    for (const at::Tensor& parameter : parameters_) {
      torch::autograd::impl::set_post_acc_grad_hooks(parameter, nullptr);
    }
    forget_gradients(parameters_);
    return readiness;
  }

 private:
  void set_hooks(const detail::AfterAccumulation::Function& function) {
    for (const at::Tensor& parameter : parameters_) {
      torch::autograd::impl::set_post_acc_grad_hooks(
          parameter, std::make_unique<detail::AfterAccumulation>(function));
    }
  }

  std::vector<at::Tensor> parameters_;
  std::shared_ptr<int64_t> branches_ = std::make_shared<int64_t>(0);
};

} // namespace benchmark

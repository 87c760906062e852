// SPDX-License-Identifier: MIT
#pragma once

// An optimiser that steps while backward runs, one parameter after the other:
//
//   torch::optim::Adam optimizer(net->parameters(), 1e-3);
//   const revnet::StepInBackward stepping(optimizer);
//   loss.backward(); // is the update, too, and leaves no gradients
//
// To copy: it needs LibTorch and no other file.

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/optim/optimizer.h>
#include <torch/types.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <unordered_set>
#include <utility>
#include <vector>

namespace revnet {

/// While it lives, the optimiser updates each parameter as soon as backward has
/// the whole of its gradient, and lets that gradient go.
///
/// The optimiser, which has to outlive it, stays what it is: groups, learning
/// rates, schedules and files work as ever, and its step() finds nothing to do.
/// Weights are bit for bit those of a step after backward.
///
/// Memory:   gradients of what autograd hands over at once, not of all
///           parameters.
/// Throws:   c10::Error if a parameter has such a hook already or comes twice;
///           in backward, if a Reducer (DataParallel) waits for its gradient.
/// Avoid if: gradients are clipped by their common norm, accumulated over several
///           backward passes, or read after them. Of two losses whose forwards
///           came first, only one can go backward: parameters have changed by
///           then, which is an error. Their sum can.
/// Source:   PyTorch's tutorial "How to save memory by fusing the optimizer step
///           into the backward pass", which has an optimiser for each parameter.
class StepInBackward final {
 public:
  explicit StepInBackward(torch::optim::Optimizer& optimizer)
      : optimizer_(optimizer) {
    check_parameters();
    auto& groups = optimizer_.param_groups();
    for (size_t group = 0; group < groups.size(); ++group) {
      for (const torch::Tensor& parameter : groups[group].params()) {
        torch::autograd::impl::set_post_acc_grad_hooks(
            parameter, std::make_unique<Hook>(*this, group));
        parameters_.push_back(parameter);
      }
    }
  }
  StepInBackward(const StepInBackward&) = delete;
  StepInBackward& operator=(const StepInBackward&) = delete;
  ~StepInBackward() {
    for (const torch::Tensor& parameter : parameters_) {
      torch::autograd::impl::set_post_acc_grad_hooks(parameter, nullptr);
    }
  }

 private:
  struct Hook final : torch::autograd::PostAccumulateGradHook {
    Hook(StepInBackward& stepping_, size_t group_)
        : stepping(stepping_), group(group_) {}
    void operator()(const torch::Tensor& parameter) override {
      stepping.step(group, parameter);
    }
    StepInBackward& stepping;
    size_t group;
  };

  /// While it lives, the optimiser's groups hold one parameter alone: what a
  /// step costs does not grow with their number.
  class Alone {
   public:
    Alone(
        std::vector<torch::optim::OptimizerParamGroup>& groups,
        size_t group,
        const torch::Tensor& parameter)
        : groups_(groups) {
      for (auto& each : groups_) {
        all_.push_back(std::exchange(each.params(), {}));
      }
      groups_[group].params().push_back(parameter);
    }
    Alone(const Alone&) = delete;
    Alone& operator=(const Alone&) = delete;
    ~Alone() {
      for (size_t i = 0; i < all_.size(); ++i) {
        groups_[i].params() = std::move(all_[i]);
      }
    }

   private:
    std::vector<torch::optim::OptimizerParamGroup>& groups_;
    std::vector<std::vector<torch::Tensor>> all_;
  };

  void check_parameters() const {
    std::unordered_set<const void*> seen;
    for (const auto& group : optimizer_.param_groups()) {
      for (const torch::Tensor& parameter : group.params()) {
        TORCH_CHECK(
            seen.insert(parameter.unsafeGetTensorImpl()).second &&
                !torch::autograd::impl::post_acc_grad_hooks(parameter),
            "StepInBackward::StepInBackward(): expected distinct parameters "
            "without a post-accumulate hook, but got one of sizes ",
            parameter.sizes(),
            " that comes twice or has one. Let one optimiser step for it.");
      }
    }
  }

  void step(size_t group, torch::Tensor parameter) {
    // What averages gradients over processes waits for them behind this hook.
    TORCH_CHECK(
        torch::autograd::impl::grad_accumulator(parameter)
            ->post_hooks()
            .empty(),
        "StepInBackward: expected gradients that nothing else waits for, but "
        "got a parameter of a c10d::Reducer (DataParallel), which averages them "
        "later. Step after backward there.");
    const std::lock_guard<std::mutex> lock(
        mutex_); // devices have a thread each
    const Alone alone(optimizer_.param_groups(), group, parameter);
    optimizer_.step();
    // SGD writes through data(), which graphs that need the old value do not see.
    parameter.unsafeGetTensorImpl()->bump_version();
    parameter.mutable_grad().reset();
  }

  torch::optim::Optimizer& optimizer_;
  std::vector<torch::Tensor> parameters_;
  std::mutex mutex_;
};

} // namespace revnet

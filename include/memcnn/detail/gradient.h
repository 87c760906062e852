// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/nn/module.h>

#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// Takes the tensor hooks off some leaves for a while.
///
/// A nested grad() on a leaf fires its hooks; they belong to the outer backward
/// pass, which fires them once, on the whole gradient (Note [Recomputation],
/// rule 3).
class HooksAside {
 public:
  explicit HooksAside(const Tensors& leaves) {
    for (const at::Tensor& leaf : leaves) {
      auto& hooks = torch::autograd::impl::hooks(leaf);
      if (!hooks.empty()) {
        aside_.emplace_back(leaf, std::move(hooks));
        hooks.clear();
      }
    }
  }
  HooksAside(const HooksAside&) = delete;
  HooksAside& operator=(const HooksAside&) = delete;
  ~HooksAside() {
    for (auto& [leaf, hooks] : aside_) {
      torch::autograd::impl::hooks(leaf) = std::move(hooks);
    }
  }

 private:
  using Hooks = std::vector<std::unique_ptr<torch::autograd::FunctionPreHook>>;
  std::vector<std::pair<at::Tensor, Hooks>> aside_;
};

/// Stops where a module reaches a tensor that needs a gradient and is neither
/// its argument nor its registered parameter: recomputation would cut it off.
inline void check_reaches_only(
    const Tensors& outputs,
    const Tensors& arguments,
    const torch::nn::Module& module) {
  std::unordered_set<const at::TensorImpl*> known;
  for (const at::Tensor& argument : arguments) {
    known.insert(argument.unsafeGetTensorImpl());
  }
  for (const at::Tensor& parameter : module.parameters()) {
    known.insert(parameter.unsafeGetTensorImpl());
  }
  std::unordered_set<const torch::autograd::Node*> seen;
  for (const at::Tensor& argument : arguments) {
    seen.insert(argument.grad_fn().get()); // what lies beyond is not ours
  }
  std::vector<torch::autograd::Node*> pending;
  const auto visit = [&](torch::autograd::Node* node) {
    if (node != nullptr && seen.insert(node).second) {
      pending.push_back(node);
    }
  };
  for (const at::Tensor& output : outputs) {
    visit(output.grad_fn().get());
  }
  while (!pending.empty()) {
    torch::autograd::Node* node = pending.back();
    pending.pop_back();
    if (auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) {
      TORCH_CHECK(
          known.count(leaf->variable.unsafeGetTensorImpl()) != 0,
          "memcnn: expected '",
          module.name(),
          "' to compute from its arguments and registered parameters only, but "
          "got another tensor that requires a gradient (sizes ",
          leaf->variable.sizes(),
          "), which would be lost. Register it with register_parameter(), pass "
          "it as an argument, or detach it.");
    }
    for (const torch::autograd::Edge& edge : node->next_edges()) {
      visit(edge.function.get());
    }
  }
}

/// What becomes of a local graph once its gradients are known.
enum class GraphUse { kFree, kRetain, kDifferentiate };

/// Gradients of some outputs with respect to arguments (first) and parameters
/// (after them); undefined where an output does not depend on one. Accumulates
/// nowhere and fires no hook of a parameter.
inline Tensors local_gradient(
    Tensors outputs,
    Tensors grad_outputs,
    const Tensors& arguments,
    const Tensors& parameters,
    GraphUse use = GraphUse::kFree) {
  torch::autograd::edge_list roots;
  Tensors seeds;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].requires_grad() && grad_outputs[i].defined()) {
      // Under autocast an output may be narrower than what it is added to.
      seeds.push_back(grad_outputs[i].to(outputs[i].scalar_type()));
      roots.push_back(torch::autograd::impl::gradient_edge(outputs[i]));
    }
  }
  torch::autograd::edge_list sources;
  for (const Tensors* group : {&arguments, &parameters}) {
    for (const at::Tensor& source : *group) {
      sources.push_back(torch::autograd::impl::gradient_edge(source));
    }
  }
  if (roots.empty() || sources.empty()) {
    return Tensors(sources.size());
  }
  // The graph needs its edges only: values that nobody else holds go now, before
  // the peak, which torch::autograd::grad() would keep to the end.
  outputs.clear();
  grad_outputs.clear();
  const HooksAside hooks_aside(parameters);
  return torch::autograd::Engine::get_default_engine().execute(
      roots,
      seeds,
      /*keep_graph=*/use != GraphUse::kFree,
      /*create_graph=*/use == GraphUse::kDifferentiate,
      /*accumulate_grad=*/false,
      sources);
}

} // namespace memcnn::detail

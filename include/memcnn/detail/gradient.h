// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/graph_node.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/nn/module.h>

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// Takes the hooks of some tensors off for a while, each known by its edge.
///
/// A nested pass that ends at a tensor fires its hooks; they belong to the outer
/// backward pass, which fires them once, on the whole gradient
/// (Note [Recomputation], rule 3).
class HooksAside {
 public:
  explicit HooksAside(const torch::autograd::edge_list& edges) {
    for (const torch::autograd::Edge& edge : edges) {
      // Without hooks a node is only looked at: others may do so, too.
      if (!edge.function->tensor_pre_hooks().empty() ||
          !edge.function->retains_grad_hooks().empty()) {
        aside_.push_back({edge.function, {}, {}});
        aside_.back().swap();
      }
    }
  }
  HooksAside(const HooksAside&) = delete;
  HooksAside& operator=(const HooksAside&) = delete;
  ~HooksAside() {
    for (Hooks& hooks : aside_) {
      hooks.swap();
    }
  }

 private:
  using Hook = std::unique_ptr<torch::autograd::FunctionPreHook>;

  struct Hooks {
    void swap() {
      pre_hooks.swap(node->tensor_pre_hooks());
      retain_grad.swap(node->retains_grad_hooks());
    }

    NodePtr node;
    std::vector<Hook> pre_hooks;
    std::unordered_map<size_t, Hook> retain_grad;
  };

  std::vector<Hooks> aside_;
};

/// Places in a graph: where tensors came from.
using Edges = std::unordered_set<torch::autograd::Edge>;

/// Where these tensors came from, those that need a gradient.
inline Edges edges_of(std::initializer_list<Tensors> groups) {
  Edges edges;
  for (const Tensors& group : groups) {
    for (const at::Tensor& tensor : group) {
      if (tensor.requires_grad()) {
        edges.insert(torch::autograd::impl::gradient_edge(tensor));
      }
    }
  }
  return edges;
}

/// Follows a graph from an edge on, each edge once, but not beyond those for
/// which `enters` is false.
template <class Fn>
void follow(const torch::autograd::Edge& from, Edges& seen, const Fn& enters) {
  torch::autograd::edge_list pending = {from};
  while (!pending.empty()) {
    const torch::autograd::Edge edge = std::move(pending.back());
    pending.pop_back();
    if (edge.is_valid() && seen.insert(edge).second && enters(edge)) {
      const auto& next = edge.function->next_edges();
      pending.insert(pending.end(), next.begin(), next.end());
    }
  }
}

/// Stops where the graph ends at a tensor that nobody knows.
inline void check_known(
    const torch::autograd::Node& node,
    const torch::nn::Module& module) {
  using torch::autograd::AccumulateGrad;
  if (const auto* leaf = dynamic_cast<const AccumulateGrad*>(&node)) {
    TORCH_CHECK(
        false,
        "memcnn: expected '",
        module.name(),
        "' to compute from its arguments and registered parameters only, but "
        "got another tensor that requires a gradient (sizes ",
        leaf->variable.sizes(),
        "), which would be lost. Register it with register_parameter(), pass "
        "it as an argument, or detach it.");
  }
}

/// Stops where one end of a graph was computed from another: a nested pass
/// would run what lies between them, and so would the outer one.
inline void check_independent(
    const Edges& ends,
    const torch::nn::Module& module) {
  Edges seen;
  for (const torch::autograd::Edge& end : ends) {
    for (const torch::autograd::Edge& next : end.function->next_edges()) {
      follow(next, seen, [&](const torch::autograd::Edge& edge) {
        TORCH_CHECK(
            ends.count(edge) == 0,
            "memcnn: expected '",
            module.name(),
            "' to compute from parameters that are independent of each other, "
            "but got one that was computed from another, both of which it "
            "uses. Compute it in forward(), or let forward() use only one.");
        return true;
      });
    }
  }
}

/// Where a module's graph ends: at those of its arguments and registered
/// parameters that the outputs depend on. A parameter may be a leaf or have been
/// computed before, as replicas' parameters are in torch::nn::parallel: what
/// lies beyond it is a matter of the outer graph.
///
/// Stops where the graph reaches another tensor that needs a gradient:
/// recomputation would cut it off.
inline Edges ends_of(
    const Tensors& outputs,
    const Tensors& arguments,
    const torch::nn::Module& module) {
  const Edges known = edges_of({arguments, module.parameters()});
  Edges seen;
  Edges ends;
  for (const at::Tensor& output : outputs) {
    if (output.requires_grad()) {
      const auto edge = torch::autograd::impl::gradient_edge(output);
      follow(edge, seen, [&](const torch::autograd::Edge& reached) {
        if (known.count(reached) != 0) {
          ends.insert(reached);
          return false;
        }
        check_known(*reached.function, module);
        return true;
      });
    }
  }
  check_independent(ends, module);
  return ends;
}

/// What becomes of a local graph once its gradients are known.
enum class GraphUse { kFree, kRetain, kDifferentiate };

/// Gradients of some outputs with respect to arguments (first) and parameters
/// (after them); undefined for those that are not among the graph's ends.
/// Accumulates nowhere and fires no hook of a parameter.
inline Tensors local_gradient(
    Tensors outputs,
    Tensors grad_outputs,
    const Tensors& arguments,
    const Tensors& parameters,
    const Edges& ends,
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
  const auto sources_among = [&](const Tensors& tensors) {
    torch::autograd::edge_list edges;
    for (const at::Tensor& tensor : tensors) {
      auto edge = torch::autograd::impl::gradient_edge(tensor);
      // In place of one that the pass is not to go to: one that it cannot reach.
      edges.push_back(
          ends.count(edge) != 0
              ? std::move(edge)
              : torch::autograd::Edge(
                    make_node<torch::autograd::Identity>(), 0));
    }
    return edges;
  };
  torch::autograd::edge_list sources = sources_among(arguments);
  const torch::autograd::edge_list parameter_edges = sources_among(parameters);
  sources.insert(sources.end(), parameter_edges.begin(), parameter_edges.end());
  if (roots.empty() || sources.empty()) {
    return Tensors(sources.size());
  }
  // The graph needs its edges only: values that nobody else holds go now, before
  // the peak, which torch::autograd::grad() would keep to the end.
  outputs.clear();
  grad_outputs.clear();
  const HooksAside hooks_aside(parameter_edges);
  return torch::autograd::Engine::get_default_engine().execute(
      roots,
      seeds,
      /*keep_graph=*/use != GraphUse::kFree,
      /*create_graph=*/use == GraphUse::kDifferentiate,
      /*accumulate_grad=*/false,
      sources);
}

} // namespace memcnn::detail

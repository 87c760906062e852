// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/graph_node.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <c10/util/flat_hash_map.h>
#include <c10/util/hash.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/nn/module.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <unordered_map>
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

/// Places in a graph: where tensors came from. Somebody else holds the graph, so
/// that nodes are known by their addresses.
class Edges {
 public:
  void insert(const torch::autograd::Edge& edge) {
    places_.insert({edge.function.get(), edge.input_nr});
  }

  bool contains(const torch::autograd::Edge& edge) const {
    return places_.count({edge.function.get(), edge.input_nr}) != 0;
  }

  template <class Fn>
  void for_each_node(const Fn& fn) const {
    for (const Place& place : places_) {
      fn(*place.first);
    }
  }

 private:
  using Place = std::pair<torch::autograd::Node*, uint32_t>;

  struct Hash {
    size_t operator()(const Place& place) const {
      return c10::get_hash(place.first, place.second);
    }
  };

  ska::flat_hash_set<Place, Hash> places_;
};

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

/// Nodes of a graph that were met.
using Nodes = ska::flat_hash_set<const torch::autograd::Node*>;

/// Follows a graph from an edge on, beyond each node once, but not beyond edges
/// for which `enters` is false.
template <class Fn>
void follow(const torch::autograd::Edge& from, Nodes& seen, const Fn& enters) {
  c10::SmallVector<const torch::autograd::Edge*, 16> pending = {&from};
  while (!pending.empty()) {
    const torch::autograd::Edge& edge = *pending.pop_back_val();
    if (edge.is_valid() && enters(edge) &&
        seen.insert(edge.function.get()).second) {
      for (const torch::autograd::Edge& next : edge.function->next_edges()) {
        pending.push_back(&next);
      }
    }
  }
}

/// Stops where the graph ends at a tensor that nobody knows.
inline void check_known(
    const torch::autograd::Node& node,
    const torch::nn::Module& module) {
  using torch::autograd::AccumulateGrad;
  const auto* const leaf = node.next_edges().empty()
      ? dynamic_cast<const AccumulateGrad*>(&node)
      : nullptr;
  if (leaf != nullptr) {
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
  Nodes seen;
  ends.for_each_node([&](const torch::autograd::Node& end) {
    for (const torch::autograd::Edge& next : end.next_edges()) {
      follow(next, seen, [&](const torch::autograd::Edge& edge) {
        TORCH_CHECK(
            !ends.contains(edge),
            "memcnn: expected '",
            module.name(),
            "' to compute from parameters that are independent of each other, "
            "but got one that was computed from another, both of which it "
            "uses. Compute it in forward(), or let forward() use only one.");
        return true;
      });
    }
  });
}

/// Where the graph of a module may end: at its arguments and registered
/// parameters.
inline Edges edges_of(
    const Tensors& arguments,
    const torch::nn::Module& module) {
  Edges edges = edges_of({arguments});
  for_each_parameter(module, [&](const at::Tensor& parameter) {
    if (parameter.requires_grad()) {
      edges.insert(torch::autograd::impl::gradient_edge(parameter));
    }
  });
  return edges;
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
  const Edges known = edges_of(arguments, module);
  Nodes seen;
  Edges ends;
  for (const at::Tensor& output : outputs) {
    if (output.requires_grad()) {
      const auto edge = torch::autograd::impl::gradient_edge(output);
      follow(edge, seen, [&](const torch::autograd::Edge& reached) {
        if (known.contains(reached)) {
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
          ends.contains(edge) ? std::move(edge)
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

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/graph_node.h>
#include <memcnn/detail/ownership.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/rebuilt.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <c10/util/flat_hash_map.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>
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
  explicit HooksAside(at::ArrayRef<torch::autograd::Edge> edges) {
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

/// Where the graph of a module's run may end: where its arguments and registered
/// parameters came from, those that need a gradient. Which of them the graph
/// reaches is noted here.
class Ends {
 public:
  Ends(const Tensors& arguments, const torch::nn::Module& module) {
    const auto add = [&](const at::Tensor& tensor) {
      if (tensor.requires_grad()) {
        ends_.push_back({torch::autograd::impl::gradient_edge(tensor)});
      }
    };
    std::for_each(arguments.begin(), arguments.end(), add);
    for_each_parameter(module, add);
    std::sort(ends_.begin(), ends_.end());
  }

  /// Whether the graph may end at an edge that it reaches.
  bool reach(const torch::autograd::Edge& edge) {
    const auto end = find(edge);
    if (end != ends_.end()) {
      end->is_reached = true;
    }
    return end != ends_.end();
  }

  void reach_all() {
    for (End& end : ends_) {
      end.is_reached = true;
    }
  }

  /// Whether the graph ends at an edge.
  bool is_reached(const torch::autograd::Edge& edge) {
    const auto end = find(edge);
    return end != ends_.end() && end->is_reached;
  }

  /// Calls fn with the node of each end that was reached.
  template <class Fn>
  void for_each_node(const Fn& fn) const {
    for (const End& end : ends_) {
      if (end.is_reached) {
        fn(*end.edge.function);
      }
    }
  }

 private:
  struct End {
    torch::autograd::Edge edge;
    bool is_reached = false;

    bool operator<(const End& other) const {
      return is_before(edge, other.edge);
    }
  };

  static bool is_before(
      const torch::autograd::Edge& a,
      const torch::autograd::Edge& b) {
    return std::tie(a.function, a.input_nr) < std::tie(b.function, b.input_nr);
  }

  End* find(const torch::autograd::Edge& edge) {
    End* const end = std::lower_bound(
        ends_.begin(), ends_.end(), edge, [](const End& a, const auto& b) {
          return is_before(a.edge, b);
        });
    return end != ends_.end() && end->edge == edge ? end : ends_.end();
  }

  c10::SmallVector<End, 16> ends_; // in their order
};

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
  if (!node.next_edges().empty()) {
    return;
  }
  if (const auto* leaf = dynamic_cast<const AccumulateGrad*>(&node)) {
    TORCH_CHECK(
        !leaf->variable.requires_grad(), // it was frozen after forward
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
inline void check_independent(Ends& ends, const torch::nn::Module& module) {
  Nodes seen;
  ends.for_each_node([&](const torch::autograd::Node& end) {
    for (const torch::autograd::Edge& next : end.next_edges()) {
      follow(next, seen, [&](const torch::autograd::Edge& edge) {
        TORCH_CHECK(
            !ends.is_reached(edge),
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

/// Where a module's graph ends: at those of its arguments and registered
/// parameters that the outputs depend on. A parameter may be a leaf or have been
/// computed before, as replicas' parameters are in torch::nn::parallel: what
/// lies beyond it is a matter of the outer graph.
///
/// Stops where the graph reaches another tensor that needs a gradient:
/// recomputation would cut it off.
inline Ends ends_of(
    const Tensors& outputs,
    const Tensors& arguments,
    const torch::nn::Module& module) {
  Ends ends(arguments, module);
  Nodes seen(/*bucket_count=*/32);
  for (const at::Tensor& output : outputs) {
    if (output.requires_grad()) {
      const auto edge = torch::autograd::impl::gradient_edge(output);
      follow(edge, seen, [&](const torch::autograd::Edge& reached) {
        if (ends.reach(reached)) {
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

/// Adds a gradient to a sum, which may be undefined yet; one that is undefined
/// adds nothing.
inline void add_gradient(at::Tensor& sum, at::Tensor gradient) {
  if (!gradient.defined()) {
    return;
  }
  if (!sum.defined()) {
    // What others refer to they may go on to overwrite.
    sum = is_its_own(gradient) ? std::move(gradient) : gradient.clone();
  } else if (is_sole_owner(sum) && !at::GradMode::is_enabled()) {
    sum.add_(gradient);
  } else {
    sum = sum + gradient;
  }
}

/// Whether a gradient of what travels in parts arrived: that of each part is then
/// defined, zeros if need be.
inline bool complete_gradients(Tensors& grads, const Tensors& parts) {
  if (none_defined(grads)) {
    return false;
  }
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined()) {
      grads[i] = at::zeros_like(parts[i]);
    }
  }
  return true;
}

/// What becomes of a local graph once its gradients are known.
enum class GraphUse { kFree, kRetain, kDifferentiate };

/// A gradient in the dtype of what it is the gradient of.
inline at::Tensor as_dtype_of(const at::Tensor& like, at::Tensor gradient) {
  return gradient.scalar_type() == like.scalar_type()
      ? std::move(gradient)
      : gradient.to(like.scalar_type());
}

/// Gradients of some outputs with respect to arguments (first) and parameters
/// (after them); undefined for those that are not among the graph's ends.
/// Accumulates nowhere and fires no hook of a parameter.
inline Tensors local_gradient(
    Tensors outputs,
    Tensors grad_outputs,
    const Tensors& arguments,
    const Tensors& parameters,
    Ends ends,
    GraphUse use = GraphUse::kFree) {
  torch::autograd::edge_list roots;
  Tensors seeds;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].requires_grad() && grad_outputs[i].defined()) {
      // Under autocast an output may be narrower than what it is added to.
      seeds.push_back(as_dtype_of(outputs[i], grad_outputs[i]));
      roots.push_back(torch::autograd::impl::gradient_edge(outputs[i]));
    }
  }
  torch::autograd::edge_list sources;
  for (const Tensors* tensors : {&arguments, &parameters}) {
    for (const at::Tensor& tensor : *tensors) {
      auto edge = torch::autograd::impl::gradient_edge(tensor);
      // In place of one that the pass is not to go to: one that it cannot reach.
      sources.push_back(
          ends.is_reached(edge)
              ? std::move(edge)
              : torch::autograd::Edge(
                    make_node<torch::autograd::Identity>(), 0));
    }
  }
  if (roots.empty() || sources.empty()) {
    return Tensors(sources.size());
  }
  // The graph needs its edges only: values that nobody else holds go now, before
  // the peak, which torch::autograd::grad() would keep to the end.
  outputs.clear();
  grad_outputs.clear();
  const HooksAside hooks_aside(
      at::ArrayRef<torch::autograd::Edge>(sources).slice(arguments.size()));
  return torch::autograd::Engine::get_default_engine().execute(
      roots,
      seeds,
      /*keep_graph=*/use != GraphUse::kFree,
      /*create_graph=*/use == GraphUse::kDifferentiate,
      /*accumulate_grad=*/false,
      sources);
}

} // namespace memcnn::detail

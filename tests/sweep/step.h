// SPDX-License-Identifier: MIT
#pragma once

#include "../support/twins.h"
#include "network.h"
#include "situations.h"

#include <ATen/CPUGeneratorImpl.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {

/// What is trained: a function of a tensor, and the module behind it.
struct Subject {
  torch::nn::Module& module;
  std::function<torch::Tensor(const torch::Tensor&)> run;
};

/// What two steps of training left.
struct Outcome {
  std::string error; // the message; what follows is then what was before it
  std::vector<torch::Tensor> outputs; // one a step
  std::vector<torch::Tensor> gradients; // of the input, then of the parameters
  std::vector<torch::Tensor> buffers;
  torch::Tensor generator; // its state
};

/// Two steps: whatever a first one leaves behind, the second one meets.
inline void train_two_steps(
    const Subject& subject,
    const Situation& situation,
    const std::vector<int64_t>& sizes,
    Outcome& outcome) {
  const torch::Tensor x = leaf(sizes, situation.dtype);
  for (int step = 0; step < 2; ++step) {
    const torch::Tensor y = subject.run(situation.arrange(made_by_a_layer(x)));
    outcome.outputs.push_back(y.detach().clone());
    // The loss weighs every value differently: a norm sees nothing of a sum.
    y.backward(torch::randn(y.sizes(), situation.dtype));
  }
  outcome.gradients.push_back(x.grad());
  for (const torch::Tensor& parameter : subject.module.parameters()) {
    outcome.gradients.push_back(parameter.grad());
  }
  outcome.buffers = subject.module.buffers();
  outcome.generator = at::detail::getDefaultCPUGenerator().get_state();
}

inline Outcome outcome_of(
    const Subject& subject,
    const Situation& situation,
    const std::vector<int64_t>& sizes) {
  subject.module.to(situation.dtype);
  subject.module.train(situation.training);
  torch::manual_seed(2);
  Outcome outcome;
  try {
    train_two_steps(subject, situation, sizes, outcome);
  } catch (const c10::Error& error) {
    outcome.error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    outcome.error = error.what();
  }
  return outcome;
}

/// Makes a coupling of two branches.
template <class Coupling>
using MakeCoupling = std::function<Coupling(
    torch::nn::AnyModule f,
    torch::nn::AnyModule g,
    const memcnn::CouplingOptions& options)>;

/// Couplings of the layer as F and G each, of one seed.
template <class Coupling>
Network<Coupling> network_of(
    const Layer& layer,
    const Situation& situation,
    const MakeCoupling<Coupling>& make) {
  torch::manual_seed(1);
  const auto options =
      memcnn::CouplingOptions().split_dim(layer.argument.split_dim());
  std::vector<Coupling> blocks;
  for (int i = 0; i < situation.depth; ++i) {
    auto f = layer.make(situation.channels);
    auto g = layer.make(situation.channels);
    blocks.push_back(make(std::move(f), std::move(g), options));
  }
  return Network<Coupling>(std::move(blocks));
}

/// Half of what a plain run keeps: room for some of the blocks.
template <class Coupling>
int64_t half_of_memory(
    Network<Coupling> network,
    const Situation& situation,
    const std::vector<int64_t>& sizes) {
  network.module().to(situation.dtype);
  const torch::Tensor x = leaf(sizes, situation.dtype);
  try {
    const memcnn::AllocationMeter meter;
    const torch::Tensor y = network.run(Path::kPlain, x);
    return meter.held_bytes() / 2;
  } catch (const c10::Error&) { // the layer refuses, and will again
    return 0;
  }
}

/// What two steps on a path leave.
template <class Coupling>
Outcome outcome_on(
    Path path,
    const Layer& layer,
    const Situation& situation,
    const MakeCoupling<Coupling>& make) {
  const std::vector<int64_t> sizes = situation.sizes(layer.argument, 2);
  Network<Coupling> network = network_of(layer, situation, make);
  if (path == Path::kBudget) {
    network.set_memory_budget(
        half_of_memory(network_of(layer, situation, make), situation, sizes));
  }
  return outcome_of(
      {network.module(),
       [&](const torch::Tensor& x) {
         return network.run(path, x);
       }},
      situation,
      sizes);
}

/// NaN counts as equal to itself, as an empty batch's statistics are.
inline bool same_bits(
    const std::vector<torch::Tensor>& a,
    const std::vector<torch::Tensor>& b) {
  return a.size() == b.size() &&
      std::equal(a.begin(), a.end(), b.begin(), [](auto& x, auto& y) {
           return x.defined() == y.defined() &&
               (!x.defined() || memcnn::detail::same_values(x, y));
         });
}

/// How far values may be off, relative to plain ones; 0 means bit by bit.
struct Tolerance {
  double outputs;
  double gradients;
};

/// In which way a found outcome is not the expected one; empty if in none.
inline std::string difference(
    const Outcome& expected,
    const Outcome& found,
    const Tolerance& tolerance) {
  if (expected.error.empty() != found.error.empty()) {
    return found.error.empty() ? "no error, but plain: " + expected.error
                               : "error: " + found.error;
  }
  const auto is_off = [](const auto& a, const auto& b, double bound) {
    return !same_bits(a, b) && !(bound > 0 && relative_error(a, b) <= bound);
  };
  if (is_off(found.outputs, expected.outputs, tolerance.outputs)) {
    return c10::str(
        "outputs differ by ", relative_error(found.outputs, expected.outputs));
  }
  if (is_off(found.gradients, expected.gradients, tolerance.gradients)) {
    return c10::str(
        "gradients differ by ",
        relative_error(found.gradients, expected.gradients));
  }
  if (!same_bits(found.buffers, expected.buffers)) {
    return "buffers differ";
  }
  return expected.error.empty() && !found.generator.equal(expected.generator)
      ? "the generator's state differs"
      : "";
}

} // namespace memcnn_test

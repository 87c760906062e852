// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/config.h"
#include "benchmark/network.h"

#include <memcnn/checkpoint.h>
#include <memcnn/checkpoint_sequential.h>
#include <memcnn/kept_activations.h>
#include <memcnn/sequence.h>
#include <memcnn/wrapper.h>

#include <ATen/core/Tensor.h>
#include <torch/nn.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace benchmark {

using Halves = std::array<at::Tensor, 2>;

inline Halves halves_of(const at::Tensor& whole) {
  const auto halves = whole.chunk(2, /*dim=*/1);
  return {halves[0], halves[1]};
}

/// A way to run a network.
struct Engine {
  /// From the image to the two halves of the last output.
  std::function<Halves(const at::Tensor& image)> forward;
  /// What a budget kept of the last step; empty where nothing says that.
  std::function<memcnn::KeptActivations()> kept = nullptr;
  /// Whether forward and loss run under autocast to bfloat16.
  bool autocast = false;
};

/// x changed by what a branch returned.
inline at::Tensor updated(const at::Tensor& x, const at::Tensor& value) {
  return x + value;
}
inline at::Tensor updated(
    const at::Tensor& x,
    const memcnn::ScaleShift& value) {
  return value.scale * x + value.shift;
}

/// One coupling as a module of two halves: F and G are called as they are, with
/// nothing of the library in between, no cat and no chunk.
template <class Coupling>
struct OnHalvesImpl final : torch::nn::Module {
  explicit OnHalvesImpl(const Coupling& coupling)
      : block(register_module("block", coupling)) {}

  std::tuple<at::Tensor, at::Tensor> forward(
      const at::Tensor& x1,
      const at::Tensor& x2) {
    const at::Tensor y1 = updated(x1, block->f->forward(x2));
    return {y1, updated(x2, block->g->forward(y1))};
  }

  Coupling block;
};

template <class Coupling>
struct OnHalves : torch::nn::ModuleHolder<OnHalvesImpl<Coupling>> {
  using torch::nn::ModuleHolder<OnHalvesImpl<Coupling>>::ModuleHolder;
};

/// Calls `run` with one block after the other, between two halves.
template <class Coupling, class Run>
Engine engine_on_halves(std::shared_ptr<Network<Coupling>> network, Run run) {
  std::vector<OnHalves<Coupling>> blocks;
  for (const Coupling& block : network->blocks) {
    blocks.emplace_back(block);
  }
  return {[network, blocks, run](const at::Tensor& image) mutable {
    auto [x1, x2] = halves_of(network->stem(image));
    for (auto& block : blocks) {
      std::tie(x1, x2) = run(block, x1, x2);
    }
    return Halves{x1, x2};
  }};
}

/// Calls `run` with one coupling after the other, between whole tensors. Its
/// exact mode needs the coupling itself, which rounds.
template <class Coupling, class Run>
Engine engine_on_couplings(
    std::shared_ptr<Network<Coupling>> network,
    Run run) {
  return {[network, run](const at::Tensor& image) {
    at::Tensor x = network->stem(image);
    for (Coupling& block : network->blocks) {
      x = run(block, x);
    }
    return halves_of(x);
  }};
}

/// Ordinary autograd: every activation is kept.
template <class Coupling>
Engine plain_engine(std::shared_ptr<Network<Coupling>> network, bool exact) {
  const auto run = [](auto& block, const auto&... x) {
    return block->forward(x...);
  };
  return exact ? engine_on_couplings(network, run)
               : engine_on_halves(network, run);
}

/// memcnn::checkpoint() around each coupling: block inputs are kept.
template <class Coupling>
Engine checkpoint_engine(
    std::shared_ptr<Network<Coupling>> network,
    bool exact,
    bool early_stop) {
  const auto options = memcnn::CheckpointOptions().early_stop(early_stop);
  const auto run = [options](auto& block, const auto&... x) {
    return memcnn::checkpoint(options, block, x...);
  };
  return exact ? engine_on_couplings(network, run)
               : engine_on_halves(network, run);
}

/// memcnn::checkpoint_sequential() over all couplings: inputs of segments are
/// kept, and the activations of the last one, or of those that fit.
template <class Coupling>
Engine sequential_engine(
    std::shared_ptr<Network<Coupling>> network,
    std::optional<int64_t> budget_bytes) {
  torch::nn::Sequential blocks;
  for (const Coupling& block : network->blocks) {
    blocks->push_back(block);
  }
  const auto kept = std::make_shared<memcnn::KeptActivations>();
  const auto options = memcnn::CheckpointSequentialOptions()
                           .memory_budget(budget_bytes)
                           .kept(kept);
  return {
      [network, blocks, options](const at::Tensor& image) {
        return halves_of(memcnn::checkpoint_sequential(
            options, blocks, network->stem(image)));
      },
      [kept] {
        return *kept;
      }};
}

/// One InvertibleModuleWrapper a coupling.
template <class Coupling>
Engine wrapper_engine(std::shared_ptr<Network<Coupling>> network) {
  std::vector<memcnn::InvertibleModuleWrapper<Coupling>> wrappers;
  for (const Coupling& block : network->blocks) {
    wrappers.emplace_back(block);
  }
  return {[network, wrappers](const at::Tensor& image) mutable {
    at::Tensor x = network->stem(image);
    for (auto& wrapper : wrappers) {
      x = wrapper->forward(x);
    }
    return halves_of(x);
  }};
}

/// One ReversibleSequence over all couplings.
template <class Coupling>
Engine sequence_engine(
    std::shared_ptr<Network<Coupling>> network,
    std::optional<at::MemoryFormat> format,
    int64_t budget_bytes) {
  memcnn::ReversibleSequence sequence(
      memcnn::ReversibleSequenceOptions().memory_format(format).memory_budget(
          budget_bytes));
  for (const Coupling& block : network->blocks) {
    sequence->push_back(block);
  }
  return {
      [network, sequence](const at::Tensor& image) mutable {
        return halves_of(sequence->forward(network->stem(image)));
      },
      [sequence] {
        return sequence->kept();
      }};
}

/// The engine of that name. All engines of a network share its modules.
template <class Coupling>
Engine make_engine(
    const std::string& name,
    const Config& config,
    std::shared_ptr<Network<Coupling>> network,
    int64_t budget_bytes) {
  const bool exact = config.coupling == "exact";
  if (name == "plain") {
    return plain_engine(network, exact);
  }
  if (name == "checkpoint" || name == "checkpoint-whole") {
    return checkpoint_engine(
        network, exact, /*early_stop=*/name == "checkpoint");
  }
  if (name == "checkpoint-sequential") {
    return sequential_engine(network, /*budget_bytes=*/std::nullopt);
  }
  if (name == "checkpoint-sequential-budget") {
    return sequential_engine(network, budget_bytes);
  }
  if (name == "wrapper") {
    return wrapper_engine(network);
  }
  std::optional<at::MemoryFormat> format;
  if (config.sequence_format == "channels-last") {
    format = at::MemoryFormat::ChannelsLast;
  }
  return sequence_engine(
      network, format, name == "sequence" ? 0 : budget_bytes);
}

} // namespace benchmark

// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>

namespace memcnn_test {

/// How a module is run: plainly, or in one of the ways that save memory.
enum class Way {
  kPlain,
  kWrapper,
  kKeepInput,
  kResults, // a wrapper that keeps them
  kSequence,
  kBudget,
  kCheckpoint,
  kCheckpointResults
};

inline std::string name_of(Way way) {
  switch (way) {
    case Way::kPlain:
      return "Plain";
    case Way::kWrapper:
      return "Wrapper";
    case Way::kKeepInput:
      return "KeepInput";
    case Way::kResults:
      return "Results";
    case Way::kSequence:
      return "Sequence";
    case Way::kBudget:
      return "Budget";
    case Way::kCheckpoint:
      return "Checkpoint";
    default:
      return "CheckpointResults";
  }
}
inline void PrintTo(Way way, std::ostream* stream) {
  *stream << name_of(way);
}
inline std::string way_name(const testing::TestParamInfo<Way>& way) {
  return name_of(way.param);
}

/// For a suite of all ways but the plain one.
inline auto saving_ways() {
  return testing::Values(
      Way::kWrapper,
      Way::kKeepInput,
      Way::kResults,
      Way::kSequence,
      Way::kBudget,
      Way::kCheckpoint,
      Way::kCheckpointResults);
}

template <class M>
struct CheckpointedImpl final : torch::nn::Cloneable<CheckpointedImpl<M>> {
  explicit CheckpointedImpl(
      M module_,
      const memcnn::CheckpointOptions& options_ = {})
      : module(std::move(module_)), options(options_) {
    reset();
  }
  void reset() override {
    this->register_module("module", module);
  }
  torch::Tensor forward(torch::Tensor x) {
    return memcnn::checkpoint(options, module, x);
  }
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device) const override {
    return std::make_shared<CheckpointedImpl>(
        memcnn::detail::clone(module, device), options);
  }
  M module;
  memcnn::CheckpointOptions options;
};

/// A module of one Tensor to one Tensor, to be run in a way.
template <class M>
torch::nn::AnyModule run_in(Way way, M module) {
  constexpr int64_t kBudget = 1 << 20;
  using Checkpointed = CheckpointedImpl<M>;
  switch (way) {
    case Way::kPlain:
      return torch::nn::AnyModule(module);
    case Way::kWrapper:
    case Way::kKeepInput:
    case Way::kResults:
      return torch::nn::AnyModule(memcnn::InvertibleModuleWrapper(
          module,
          memcnn::InvertibleModuleWrapperOptions()
              .keep_input(way == Way::kKeepInput)
              .memory_budget(way == Way::kResults ? kBudget : 0)));
    case Way::kSequence:
    case Way::kBudget:
      return torch::nn::AnyModule(memcnn::ReversibleSequence(
          memcnn::ReversibleSequenceOptions().memory_budget(
              way == Way::kBudget ? kBudget : 0),
          module));
    default:
      return torch::nn::AnyModule(std::make_shared<Checkpointed>(
          module,
          memcnn::CheckpointOptions().memory_budget(
              way == Way::kCheckpointResults ? kBudget : 0)));
  }
}

} // namespace memcnn_test

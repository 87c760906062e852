// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>
#include <memcnn/detail/forward_only.h>
#include <memcnn/detail/node.h>
#include <memcnn/detail/run_results.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <deque>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace memcnn_test {

/// The ways in which branches run again. Checkpoint ends a second run early,
/// CheckpointToTheEnd does not.
enum class Keeping {
  kWrapper,
  kKeepInput,
  kSequence,
  kCheckpoint,
  kCheckpointToTheEnd
};

inline std::string name_of(Keeping way) {
  switch (way) {
    case Keeping::kWrapper:
      return "Wrapper";
    case Keeping::kKeepInput:
      return "KeepInput";
    case Keeping::kSequence:
      return "Sequence";
    case Keeping::kCheckpoint:
      return "Checkpoint";
    default:
      return "CheckpointToTheEnd";
  }
}
inline void PrintTo(Keeping way, std::ostream* stream) {
  *stream << name_of(way);
}
inline std::string keeping_name(const testing::TestParamInfo<Keeping>& way) {
  return name_of(way.param);
}
/// For a suite of all ways with cases that have a name.
template <class Case>
std::string way_and_case(
    const testing::TestParamInfo<std::tuple<Keeping, Case>>& test) {
  return name_of(std::get<0>(test.param)) + std::get<1>(test.param).name;
}
inline auto all_ways_of_keeping() {
  return testing::Values(
      Keeping::kWrapper,
      Keeping::kKeepInput,
      Keeping::kSequence,
      Keeping::kCheckpoint,
      Keeping::kCheckpointToTheEnd);
}

/// Runs invertible modules so that results of their dear operators are kept, as
/// within a budget that has room for them and for no block.
class Keeper {
 public:
  explicit Keeper(Keeping way, memcnn::RecordingOptions options = {})
      : way_(way), options_(options) {}

  /// In a run only these results are kept, by their numbers in each node.
  void keep_only(memcnn::detail::RunResults::Which which) {
    which_ = std::move(which);
  }

  torch::Tensor run(
      std::shared_ptr<memcnn::Invertible> block,
      const torch::Tensor& x,
      memcnn::Direction direction = memcnn::Direction::kForward) {
    if (!memcnn::detail::runs_as_node({x}, block->module())) {
      memcnn::Recording off = memcnn::Recording::off();
      return block->run(direction, {x}, off)[0];
    }
    if (is_checkpoint()) {
      block = forward_only(std::move(block), direction);
      direction = memcnn::Direction::kForward;
    }
    auto state = c10::make_intrusive<memcnn::detail::NodeState>(
        "Keeper::run()",
        std::move(block),
        direction,
        /*keep_inputs=*/way_ == Keeping::kKeepInput || is_checkpoint(),
        options_);
    auto& results = runs_.emplace_back(which_ ? &*which_ : nullptr);
    state->recording.keep_results(&results);
    return memcnn::detail::run_node(std::move(state), {x})[0];
  }

  /// Of all runs so far.
  memcnn::detail::RunResults::Sums kept() const {
    memcnn::detail::RunResults::Sums sums;
    for (const auto& run : runs_) {
      sums.count += run.kept().count;
      sums.bytes += run.kept().bytes;
    }
    return sums;
  }

  bool is_checkpoint() const {
    return way_ == Keeping::kCheckpoint || way_ == Keeping::kCheckpointToTheEnd;
  }

 private:
  std::shared_ptr<memcnn::Invertible> forward_only(
      const std::shared_ptr<memcnn::Invertible>& block,
      memcnn::Direction direction) const {
    auto off = std::make_shared<memcnn::Recording>(memcnn::Recording::off());
    return std::make_shared<memcnn::detail::ForwardOnly>(
        "Keeper::run()",
        block->module().shared_from_this(),
        [block, direction, off](const std::vector<torch::Tensor>& inputs) {
          return block->run(direction, inputs, *off);
        },
        memcnn::detail::ForwardOnlySettings{
            way_ == Keeping::kCheckpoint, /*kept_segments=*/nullptr});
  }

  Keeping way_;
  memcnn::RecordingOptions options_;
  std::optional<memcnn::detail::RunResults::Which> which_;
  std::deque<memcnn::detail::RunResults> runs_;
};

} // namespace memcnn_test

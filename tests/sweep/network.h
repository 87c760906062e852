// SPDX-License-Identifier: MIT
#pragma once

#include "../support/keeper.h"

#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {

/// A way through a chain of couplings.
enum class Path {
  kPlain,
  kWrapper,
  kKeepInput,
  kSequence,
  kBudget,
  kKeptResults,
  kCheckpoint,
  kPlainInverse,
  kWrapperInverse,
  kKeepInputInverse,
  kSequenceInverse,
};

inline const char* name_of(Path path) {
  switch (path) {
    case Path::kPlain:
      return "plain";
    case Path::kWrapper:
      return "wrapper";
    case Path::kKeepInput:
      return "wrapper with keep_input";
    case Path::kSequence:
      return "sequence";
    case Path::kBudget:
      return "sequence with a budget";
    case Path::kKeptResults:
      return "sequence that keeps results";
    case Path::kCheckpoint:
      return "checkpoint";
    case Path::kPlainInverse:
      return "plain inverse";
    case Path::kWrapperInverse:
      return "inverse of a wrapper";
    case Path::kKeepInputInverse:
      return "inverse of a wrapper with keep_input_inverse";
    case Path::kSequenceInverse:
      return "inverse of a sequence";
  }
  return "";
}

/// Paths in one direction, and the plain one that they are to be like.
struct Direction {
  Path plain;
  std::vector<Path> saving;
};

inline std::vector<Direction> directions() {
  return {
      {Path::kPlain,
       {Path::kWrapper,
        Path::kKeepInput,
        Path::kSequence,
        Path::kBudget,
        Path::kKeptResults,
        Path::kCheckpoint}},
      {Path::kPlainInverse,
       {Path::kWrapperInverse,
        Path::kKeepInputInverse,
        Path::kSequenceInverse}}};
}

/// Whether no input is rebuilt on a path.
inline bool keeps_inputs(Path path) {
  return path == Path::kKeepInput || path == Path::kKeepInputInverse ||
      path == Path::kCheckpoint;
}

/// A chain of couplings, which runs on any path.
template <class Coupling>
class Network {
 public:
  explicit Network(std::vector<Coupling> blocks) : blocks_(std::move(blocks)) {
    for (const Coupling& block : blocks_) {
      wrapped_.emplace_back(block);
      sequence_->push_back(block);
    }
  }

  /// All blocks as one module.
  torch::nn::Module& module() {
    return *sequence_;
  }

  void set_memory_budget(int64_t bytes) {
    budget_ = bytes;
  }

  torch::Tensor run(Path path, torch::Tensor x) {
    const bool keep =
        path == Path::kKeepInput || path == Path::kKeepInputInverse;
    sequence_->options.memory_budget(path == Path::kBudget ? budget_ : 0);
    switch (path) {
      case Path::kPlain:
        return chained(blocks_, x, [](auto& block, const auto& input) {
          return block->forward(input);
        });
      case Path::kWrapper:
      case Path::kKeepInput:
        return chained(wrapped_, x, [keep](auto& block, const auto& input) {
          block->options.keep_input(keep);
          return block->forward(input);
        });
      case Path::kSequence:
      case Path::kBudget:
        return sequence_->forward(x);
      case Path::kKeptResults:
        return Keeper(Keeping::kSequence).run(sequence_.ptr(), x);
      case Path::kCheckpoint:
        return chained(blocks_, x, [](auto& block, const auto& input) {
          return memcnn::checkpoint(block, input);
        });
      case Path::kPlainInverse:
        return chained(
            reversed(blocks_), x, [](auto& block, const auto& input) {
              return block->inverse(input);
            });
      case Path::kWrapperInverse:
      case Path::kKeepInputInverse:
        return chained(
            reversed(wrapped_), x, [keep](auto& block, const auto& input) {
              block->options.keep_input_inverse(keep);
              return block->inverse(input);
            });
      case Path::kSequenceInverse:
        return sequence_->inverse(x);
    }
    return x;
  }

 private:
  template <class Blocks>
  static Blocks reversed(const Blocks& blocks) {
    return Blocks(blocks.rbegin(), blocks.rend());
  }

  template <class Blocks, class Fn>
  static torch::Tensor chained(Blocks blocks, torch::Tensor x, const Fn& fn) {
    for (auto& block : blocks) {
      x = fn(block, x);
    }
    return x;
  }

  std::vector<Coupling> blocks_;
  std::vector<memcnn::InvertibleModuleWrapper<Coupling>> wrapped_;
  memcnn::ReversibleSequence sequence_{memcnn::ReversibleSequenceOptions()};
  int64_t budget_ = 0;
};

} // namespace memcnn_test

// SPDX-License-Identifier: MIT
#pragma once

#include "keeper.h"

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace memcnn_test {

/// The ways to save memory that every rule of recomputation holds for: a sequence
/// that keeps the results of all dear operators is one.
enum class Engine { kWrapper, kSequence, kKeptResults };

inline std::string name_of(Engine engine) {
  switch (engine) {
    case Engine::kWrapper:
      return "Wrapper";
    case Engine::kSequence:
      return "Sequence";
    default:
      return "KeptResults";
  }
}
inline std::string engine_name(const testing::TestParamInfo<Engine>& info) {
  return name_of(info.param);
}
inline void PrintTo(Engine engine, std::ostream* stream) {
  *stream << name_of(engine);
}
inline auto all_engines() {
  return testing::Values(
      Engine::kWrapper, Engine::kSequence, Engine::kKeptResults);
}

using Branch = std::function<torch::nn::AnyModule()>;
using Coupling =
    memcnn::AdditiveCoupling<torch::nn::AnyModule, torch::nn::AnyModule>;

/// A chain of additive couplings that runs with ordinary autograd or with one
/// of the engines.
class Chain {
 public:
  explicit Chain(std::vector<Coupling> blocks) : blocks_(std::move(blocks)) {
    for (const Coupling& block : blocks_) {
      wrapped_.emplace_back(block);
      sequence_->push_back(block);
    }
  }

  static Chain make(size_t depth, const Branch& branch) {
    std::vector<Coupling> blocks;
    for (size_t i = 0; i < depth; ++i) {
      blocks.emplace_back(branch(), branch());
    }
    return Chain(std::move(blocks));
  }

  /// The same weights in modules of their own.
  Chain twin() const {
    std::vector<Coupling> copies;
    for (const Coupling& block : blocks_) {
      copies.emplace_back(
          std::dynamic_pointer_cast<Coupling::Impl>(block->clone()));
    }
    return Chain(std::move(copies));
  }

  torch::Tensor plain(torch::Tensor x) {
    for (Coupling& block : blocks_) {
      x = block(x);
    }
    return x;
  }

  torch::Tensor run(Engine engine, torch::Tensor x) {
    if (engine == Engine::kKeptResults) {
      return Keeper(Keeping::kSequence).run(sequence_.ptr(), x);
    }
    if (engine == Engine::kSequence) {
      return sequence_(x);
    }
    for (auto& block : wrapped_) {
      x = block(x);
    }
    return x;
  }

  torch::Tensor inverse(Engine engine, torch::Tensor y) {
    if (engine == Engine::kKeptResults) {
      return Keeper(Keeping::kSequence)
          .run(sequence_.ptr(), y, memcnn::Direction::kInverse);
    }
    if (engine == Engine::kSequence) {
      return sequence_->inverse(y);
    }
    for (auto block = wrapped_.rbegin(); block != wrapped_.rend(); ++block) {
      y = (*block)->inverse(y);
    }
    return y;
  }

  /// All blocks as one module.
  torch::nn::Module& module() {
    return *sequence_;
  }

  std::vector<torch::Tensor> parameters() const {
    return sequence_->parameters();
  }

  std::vector<torch::Tensor> gradients() const {
    std::vector<torch::Tensor> gradients;
    for (const torch::Tensor& parameter : parameters()) {
      gradients.push_back(parameter.grad());
    }
    return gradients;
  }

  Coupling& block(size_t i) {
    return blocks_[i];
  }

 private:
  std::vector<Coupling> blocks_;
  std::vector<memcnn::InvertibleModuleWrapper<Coupling>> wrapped_;
  memcnn::ReversibleSequence sequence_{memcnn::ReversibleSequenceOptions()};
};

/// |a - b| / |b|, in norms; 0 where both are undefined.
inline double relative_error(const torch::Tensor& a, const torch::Tensor& b) {
  if (!a.defined() && !b.defined()) {
    return 0;
  }
  if (!a.defined() || !b.defined()) {
    return std::numeric_limits<double>::infinity();
  }
  const torch::Tensor wide = b.detach().to(torch::kDouble);
  const double norm = wide.norm().item<double>();
  const double difference =
      (a.detach().to(torch::kDouble) - wide).norm().item<double>();
  return norm == 0 ? difference : difference / norm;
}

inline double relative_error(
    const std::vector<torch::Tensor>& a,
    const std::vector<torch::Tensor>& b) {
  if (a.size() != b.size()) {
    return std::numeric_limits<double>::infinity();
  }
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double error = relative_error(a[i], b[i]);
    worst = error > worst || std::isnan(error) ? error : worst;
  }
  return worst;
}

/// Whether two lists hold equal tensors, bit for bit.
inline bool all_equal(
    const std::vector<torch::Tensor>& a,
    const std::vector<torch::Tensor>& b) {
  return a.size() == b.size() &&
      std::equal(a.begin(), a.end(), b.begin(), [](auto& x, auto& y) {
           return x.defined() == y.defined() && (!x.defined() || x.equal(y));
         });
}

/// A leaf with a gradient, normally distributed.
inline torch::Tensor leaf(
    at::IntArrayRef sizes,
    torch::ScalarType dtype = torch::kDouble) {
  return torch::randn(sizes, dtype).requires_grad_();
}

/// A tensor that a layer made: the first block's input is then no leaf.
inline torch::Tensor made_by_a_layer(const torch::Tensor& leaf) {
  return leaf * 1.0;
}

} // namespace memcnn_test

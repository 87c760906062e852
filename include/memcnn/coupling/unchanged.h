// SPDX-License-Identifier: MIT
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <ostream>
#include <type_traits>

namespace memcnn {

/// The module behind Unchanged.
class UnchangedImpl final : public torch::nn::Cloneable<UnchangedImpl> {
 public:
  void reset() override {}

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::Unchanged()";
  }
};

/// In place of a branch of a coupling: the half that the branch would update
/// stays as it is. One-sided couplings are those of RealNVP and Glow, which
/// change places between them (SwapHalves, Permutation, Conv1x1).
///
/// Example:
///   memcnn::AffineCoupling coupling(f, memcnn::Unchanged());
class Unchanged : public torch::nn::ModuleHolder<UnchangedImpl> {
 public:
  using torch::nn::ModuleHolder<UnchangedImpl>::ModuleHolder;
  using Impl = UnchangedImpl;
};

namespace detail {

template <class Branch>
inline constexpr bool is_unchanged_v = std::is_same_v<Branch, Unchanged>;

} // namespace detail
} // namespace memcnn

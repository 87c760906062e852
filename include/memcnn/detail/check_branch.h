// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>
#include <memcnn/detail/halves.h>
#include <memcnn/invertible.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/container/sequential.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace memcnn::detail {

/// The beginning of a coupling's messages: "AdditiveCoupling::forward(): ".
inline std::string place_of(const char* coupling, Direction direction) {
  return std::string(coupling) + "::" + name_of(direction) + "(): ";
}

/// One call of a branch of a coupling, and what the branch may not do in it, in
/// words.
struct BranchCall {
  const char* coupling;
  Direction direction;
  size_t branch; // 0 is F, 1 is G
  int64_t split_dim;
  const at::Tensor& argument;

  /// The result of `compute`. A failure says where it was.
  template <class Fn>
  auto run(Fn&& compute) const {
    const auto version_before = version();
    auto value = [&] {
      try {
        return compute();
      } catch (c10::Error& error) {
        error.add_context(c10::str(
            "in ",
            name(),
            " of ",
            place_of(coupling, direction),
            "argument ",
            describe(argument),
            ", split_dim ",
            split_dim));
        throw;
      }
    }();
    TORCH_CHECK(
        version() == version_before,
        place_of(coupling, direction),
        "expected ",
        name(),
        " to leave its argument as it is, but got a change in place (argument ",
        describe(argument),
        "). Let it begin with an operation that is not in place.");
    return value;
  }

  /// Stops where a tensor of the value cannot update the other half.
  void check_sizes(const at::Tensor& part, const at::Tensor& updated) const {
    TORCH_CHECK_VALUE(
        part.defined() && part.sizes() == updated.sizes(),
        place_of(coupling, direction),
        "expected ",
        name(),
        " to return the sizes ",
        updated.sizes(),
        " of the half that it updates, but got ",
        describe(part),
        " for an argument of sizes ",
        argument.sizes(),
        " (split_dim ",
        split_dim,
        "). Give an even size in that dim, or a branch that maps one half to "
        "the sizes of the other.");
  }

  /// Stops where it would widen the other half.
  void check_dtype(const at::Tensor& part, const at::Tensor& updated) const {
    TORCH_CHECK_TYPE(
        at::result_type(updated, part) == updated.scalar_type(),
        place_of(coupling, direction),
        "expected ",
        name(),
        " to return no wider dtype than its input's ",
        updated.scalar_type(),
        ", but got ",
        part.scalar_type(),
        " (argument ",
        describe(argument),
        "). Convert the input, or the branch's result with to().");
  }

 private:
  const char* name() const {
    return branch == 0 ? "F" : "G";
  }

  /// Inference tensors have no version, and no graph that a change could hurt.
  int64_t version() const {
    return argument.is_inference() ? 0 : argument._version();
  }
};

/// Lets a branch of a coupling that is an adapter, or a Sequential that ends in
/// one, split what the coupling splits. Stops where it is for another dimension.
inline void give_split_dim(
    const char* coupling,
    std::shared_ptr<torch::nn::Module> branch,
    const char* name,
    int64_t split_dim) {
  while (std::dynamic_pointer_cast<torch::nn::SequentialImpl>(branch) &&
         !branch->children().empty()) {
    branch = branch->children().back();
  }
  auto* const adapter = dynamic_cast<SplitsChannels*>(branch.get());
  TORCH_CHECK_VALUE(
      adapter == nullptr || adapter->take_split_dim(split_dim),
      coupling,
      "::",
      coupling,
      "(): expected the adapter ",
      name,
      " to have the coupling's split_dim, but got ",
      adapter == nullptr ? 0 : adapter->split_dim(),
      " (coupling ",
      split_dim,
      "). Give each coupling an adapter of its own, without CouplingOptions: "
      "it takes its coupling's.");
}

} // namespace memcnn::detail

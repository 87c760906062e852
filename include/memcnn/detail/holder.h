// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace memcnn::detail {

/// A holder is how LibTorch hands modules around: torch::nn::ModuleHolder (what
/// TORCH_MODULE makes), torch::nn::Sequential among them, or AnyModule.
template <class T>
inline constexpr bool is_any_module_v = std::is_same_v<T, torch::nn::AnyModule>;

template <class T>
inline constexpr bool is_holder_v =
    is_any_module_v<T> || torch::detail::is_module_holder<T>::value;

/// The type of module in a ModuleHolder; void for other types.
template <class T, class = void>
struct contained {
  using type = void;
};
template <class T>
struct contained<T, std::void_t<typename T::ContainedType>> {
  using type = typename T::ContainedType;
};
template <class T>
using contained_t = typename contained<T>::type;

/// What a holder holds, whatever its kind.
template <class Holder>
std::shared_ptr<torch::nn::Module> module_of(const Holder& holder) {
  return holder.ptr();
}

/// Gives a cloned module the train and eval flags of its original: clone()
/// sets some kinds of containers to train mode.
inline void copy_modes(
    const torch::nn::Module& original,
    torch::nn::Module& copy) {
  const auto from = original.modules();
  const auto to = copy.modules();
  for (size_t i = 0; i < from.size(); ++i) {
    to[i]->train(from[i]->is_training());
  }
}

/// NaN counts as equal to itself.
inline bool same_values(const at::Tensor& a, const at::Tensor& b) {
  return at::equal(a, b) ||
      (a.is_floating_point() &&
       at::allclose(a, b, /*rtol=*/0, /*atol=*/0, /*equal_nan=*/true));
}

/// Stops where clone() left parts of a copy shared with its original or reset
/// to new values, as it does without a word for children that are not
/// Cloneable.
inline void check_cloned(
    const torch::nn::Module& original,
    const torch::nn::Module& copy) {
  const auto check = [&](bool cloned, const std::string& what) {
    TORCH_CHECK(
        cloned,
        "memcnn: expected clone() of '",
        original.name(),
        "' to copy all of it, but got a copy whose ",
        what,
        ". Derive each of its modules from torch::nn::Cloneable and create its "
        "children in reset(), or override clone().");
  };
  const auto parts = original.modules();
  const auto copied_parts = copy.modules();
  check(parts.size() == copied_parts.size(), "number of modules differs");
  for (size_t i = 0; i < parts.size(); ++i) {
    check(
        parts[i] != copied_parts[i],
        "part '" + parts[i]->name() + "' is shared with the original");
  }
  const auto check_tensors = [&](const auto& from, const auto& to) {
    check(from.size() == to.size(), "number of tensors differs");
    for (size_t i = 0; i < from.size(); ++i) {
      check(
          !from[i].defined() ||
              (to[i].defined() && !from[i].is_same(to[i]) &&
               from[i].sizes() == to[i].sizes() &&
               same_values(from[i].to(to[i].device()), to[i])),
          "tensors are shared with the original or hold other values");
    }
  };
  const at::NoGradGuard no_grad;
  check_tensors(original.parameters(), copy.parameters());
  check_tensors(original.buffers(), copy.buffers());
}

/// A deep copy of what a holder holds, or an error; never a shared part.
template <class Holder>
Holder clone(
    const Holder& holder,
    const std::optional<c10::Device>& device = std::nullopt) {
  const std::shared_ptr<torch::nn::Module> original = module_of(holder);
  Holder copy = [&] {
    if constexpr (is_any_module_v<Holder>) {
      return holder.clone(device);
    } else if constexpr (std::is_same_v<Holder, torch::nn::Sequential>) {
      // Sequential's own clone() renames its children, and with them the keys
      // of what is saved.
      torch::nn::Sequential renamed;
      const auto names = holder->named_children().keys();
      for (size_t i = 0; i < names.size(); ++i) {
        renamed->push_back(names[i], (holder->begin() + i)->clone(device));
      }
      return renamed;
    } else {
      auto cloned = original->clone(device);
      return Holder(
          std::dynamic_pointer_cast<typename Holder::ContainedType>(cloned));
    }
  }();
  check_cloned(*original, *copy.ptr());
  copy_modes(*original, *copy.ptr());
  return copy;
}

/// A deep copy of `second` beside that of `first`: the same copy where both
/// hold one module.
template <class First, class Second>
Second clone_beside(
    const First& first,
    const First& first_copy,
    const Second& second,
    const std::optional<c10::Device>& device) {
  if constexpr (std::is_same_v<First, Second>) {
    if (module_of(first) == module_of(second)) {
      return first_copy;
    }
  }
  return clone(second, device);
}

} // namespace memcnn::detail

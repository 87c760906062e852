// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/holder.h>
#include <memcnn/detail/plain_module.h>
#include <memcnn/detail/signature.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace memcnn {
namespace detail {

/// True for a module that can be a block of a ReversibleSequence. For others an
/// error of the compiler, which says what is missing.
template <class M>
struct is_block : std::true_type {
  static_assert(
      has_inverse_v<M>,
      "memcnn: this module has no inverse(): ReversibleSequence needs modules "
      "with one non-template, non-overloaded member `inverse`. For others "
      "there is memcnn::checkpoint().");
  static_assert(
      has_forward_v<M>,
      "memcnn: this module has no forward() that a ReversibleSequence can run: "
      "it must be one non-template, non-overloaded member.");
  static_assert(
      !has_inverse_v<M> || !has_forward_v<M> ||
          maps_tensor_given_v<
              typename forward_signature<M>::type,
              typename inverse_signature<M>::type>,
      "memcnn: forward and inverse of a block in a ReversibleSequence take one "
      "Tensor and return one; both may take the same conditions after it, "
      "Tensors, too.");
};

/// What inverse() returns without conditions.
template <class M>
at::Tensor inverse_of(M& module, const at::Tensor& output) {
  if constexpr (maps_tensor_v<typename inverse_signature<M>::type>) {
    return module.inverse(output);
  } else {
    TORCH_CHECK_VALUE(
        false,
        "AnyInvertible::inverse(): expected a module without conditions, but "
        "got one that takes some. Call inverse() of the module itself.");
  }
}

template <class T>
inline constexpr bool is_shared_module_v = false;
template <class M>
inline constexpr bool is_shared_module_v<std::shared_ptr<M>> =
    torch::detail::is_module<M>::value;

/// The module behind what users pass as a block: a holder, a shared pointer, or
/// a module by itself, which is moved or copied.
template <class T>
auto block_pointer(T&& block) {
  using Passed = std::decay_t<T>;
  static_assert(
      !is_any_module_v<Passed>,
      "memcnn: an AnyModule has forgotten the inverse() of what it holds. Make "
      "a memcnn::AnyInvertible of the module instead.");
  static_assert(
      is_any_module_v<Passed> || is_shared_module_v<Passed> ||
          torch::detail::is_module_holder<Passed>::value ||
          torch::detail::is_module<Passed>::value,
      "memcnn: ReversibleSequence takes modules: their holders, as "
      "TORCH_MODULE makes them, shared pointers to them, or themselves.");
  if constexpr (is_shared_module_v<Passed>) {
    static_assert(is_block<typename Passed::element_type>::value);
    return std::shared_ptr(std::forward<T>(block));
  } else if constexpr (torch::detail::is_module_holder<Passed>::value) {
    static_assert(is_block<contained_t<Passed>>::value);
    return std::shared_ptr(block.ptr());
  } else {
    static_assert(is_block<Passed>::value);
    return std::make_shared<Passed>(std::forward<T>(block));
  }
}

} // namespace detail

/// A block of a ReversibleSequence, of any type: a torch::nn::AnyModule that
/// has an inverse as well. Copies share the module.
///
/// Made of a module's holder, of a shared pointer to it, or of the module; its
/// forward and inverse map one Tensor to one Tensor. ptr(), ptr<T>(), get<T>()
/// and forward() are AnyModule's.
///
/// Throws:   c10::ValueError if the pointer is null; c10::Error if get<T>() or
///           ptr<T>() asks for another type than that of the module.
/// Example:
///   for (memcnn::AnyInvertible& block : *trunk) {
///     x = block.forward(x);
///   }
class AnyInvertible : public torch::nn::AnyModule {
 public:
  template <
      class T,
      class = std::enable_if_t<!std::is_same_v<std::decay_t<T>, AnyInvertible>>>
  /* implicit */ AnyInvertible(T&& block)
      : AnyInvertible(
            Checked(),
            detail::block_pointer(std::forward<T>(block))) {}

  at::Tensor inverse(const at::Tensor& output) {
    return inverse_(*this, output);
  }

  /// A deep copy, or an error; never a shared part.
  AnyInvertible clone(
      const std::optional<c10::Device>& device = std::nullopt) const {
    AnyInvertible copy = clone_(*this, device);
    copy.conditions_ = conditions_;
    return copy;
  }

 private:
  friend class InverseOfImpl;
  friend class OnPartImpl;
  friend class ReversibleSequenceImpl;
  struct Checked {};

  template <class M>
  AnyInvertible(Checked, std::shared_ptr<M> module)
      : AnyModule(module),
        invertible_(detail::as_invertible(module)),
        inverse_([](AnyInvertible& self, const at::Tensor& output) {
          return detail::inverse_of(self.get<M>(), output);
        }),
        clone_([](const AnyInvertible& self,
                  const std::optional<c10::Device>& device) {
          const torch::nn::ModuleHolder<M> original(self.ptr<M>());
          return AnyInvertible(detail::clone(original, device));
        }) {
    TORCH_CHECK_VALUE(
        module != nullptr,
        "AnyInvertible::AnyInvertible(): expected a module, but got a null "
        "pointer. Create the module first, as std::make_shared does.");
  }

  std::shared_ptr<Invertible> invertible_;
  std::optional<std::vector<size_t>> conditions_; // which ones, in a sequence
  at::Tensor (*inverse_)(AnyInvertible&, const at::Tensor&);
  AnyInvertible (
      *clone_)(const AnyInvertible&, const std::optional<c10::Device>&);
};

} // namespace memcnn

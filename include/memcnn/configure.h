// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/configurable.h>
#include <memcnn/sequence.h>
#include <memcnn/wrapper.h>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <type_traits>

namespace memcnn {
namespace detail {

/// Calls `change` with a module's options if they are Options, and what it
/// takes.
template <class Options, class Change>
void change_options(torch::nn::Module& module, const Change& change) {
  if constexpr (std::is_invocable_v<const Change&, Options&>) {
    static_assert(
        !std::is_invocable_v<const Change&, Options>,
        "memcnn: the function that configure() calls takes options by "
        "reference: it would change a copy.");
    if (auto* found = dynamic_cast<Configurable<Options>*>(&module)) {
      change(found->options);
    }
  }
}

} // namespace detail

/// Changes the options of every sequence, or of every wrapper, in a model,
/// itself included, however deep they lie: of which of them the parameter of
/// `change` says, and `auto&` is both. Acts from the next forward on.
///
/// A memory_budget is that of one sequence or wrapper: a model with three of them
/// keeps up to three times as much. A byte spares the most where channels are
/// many and positions few, which is in the last ones of most models, and backward
/// frees these first.
///
/// Example:
///   memcnn::configure(model, [](memcnn::ReversibleSequenceOptions& options) {
///     options.memory_budget(64 * 1024 * 1024);
///   });
///   memcnn::configure(model, [](auto& options) { options.debug(true); });
template <class Change>
void configure(torch::nn::Module& model, const Change& change) {
  static_assert(
      std::is_invocable_v<const Change&, ReversibleSequenceOptions&> ||
          std::is_invocable_v<const Change&, InvertibleModuleWrapperOptions&>,
      "memcnn: configure() takes a model, then a function of "
      "ReversibleSequenceOptions& or of InvertibleModuleWrapperOptions&.");
  model.apply([&](torch::nn::Module& module) {
    detail::change_options<ReversibleSequenceOptions>(module, change);
    detail::change_options<InvertibleModuleWrapperOptions>(module, change);
  });
}

/// Likewise, by a model's holder.
template <class M, class Change>
void configure(const torch::nn::ModuleHolder<M>& model, const Change& change) {
  configure(*model.ptr(), change);
}

} // namespace memcnn

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/forward_only.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/kept_choice.h>
#include <memcnn/detail/kept_segments.h>
#include <memcnn/detail/node.h>
#include <memcnn/detail/signature.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/kept_activations.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace memcnn {

/// Options of checkpoint().
struct CheckpointOptions {
  /// Recomputation draws the random numbers that forward drew. Costs a look at
  /// the generator before and after the module. Default: true.
  TORCH_ARG(bool, preserve_rng_state) = true;
  /// Compares what the module returns in backward with what it returned in
  /// forward, and stops where they differ: finds state that nobody registered.
  /// Costs a copy of inputs and outputs, and one more run. Default: false.
  TORCH_ARG(bool, debug) = false;
  /// The second run ends when the last tensor that backward needs is there:
  /// what comes after it, and the operator that only needs it as its argument,
  /// does not run again. Default: true.
  TORCH_ARG(bool, early_stop) = true;
  /// Bytes of results that may be kept from forward to backward, beside the
  /// inputs: of convolutions, products of matrices and attention those that save
  /// the most work for each byte, which then do not run again. Default: 0.
  TORCH_ARG(int64_t, memory_budget) = 0;
  /// Where each call says what the budget kept of it. Default: nowhere.
  TORCH_ARG(std::shared_ptr<KeptActivations>, kept) = nullptr;
};

namespace detail {

/// What forward of a held module returns for these arguments: Sequential and
/// AnyModule leave it open, and mean a Tensor.
template <class Holder, class... Args>
struct forward_result {
  using type = decltype(std::declval<Holder&>()->forward(
      std::declval<const Args&>()...));
};
template <class... Args>
struct forward_result<torch::nn::AnyModule, Args...> {
  using type = at::Tensor;
};

/// Whether an exception may leave forward of a held module, as that which ends a
/// second run early does. Of what an AnyModule or a Sequential holds that is not
/// known.
template <class Holder, class... Args>
constexpr bool may_throw() {
  if constexpr (is_any_module_v<Holder>) {
    return true;
  } else {
    return !noexcept(std::declval<contained_t<Holder>&>().forward(
        std::declval<const Args&>()...));
  }
}

/// Runs a held module as one node that keeps its inputs, or plainly where no
/// graph is recorded.
template <class Result, class Holder, class... Inputs>
Result run_checkpointed(
    const std::string& place,
    ForwardOnlySettings settings,
    RecordingOptions recording,
    const Holder& module,
    const Inputs&... inputs) {
  const auto call = [](Holder& holder, const auto&... arguments) -> Result {
    if constexpr (is_any_module_v<Holder>) {
      return holder.template forward<Result>(arguments...);
    } else {
      return holder->forward(arguments...);
    }
  };
  const Tensors flat = pack(inputs...);
  const std::shared_ptr<torch::nn::Module> target = module_of(module);
  Holder handle = module; // of the same module: a holder's forward is not const
  if (!runs_as_node(flat, *target)) {
    return call(handle, inputs...);
  }
  auto block = std::make_shared<ForwardOnly>(
      place,
      target,
      [handle, call](const Tensors& tensors) mutable {
        return pack(Spread<Result(Inputs...)>::call(
            [&](const auto&... arguments) {
              return call(handle, arguments...);
            },
            tensors));
      },
      std::move(settings));
  auto state = c10::make_intrusive<NodeState>(
      place,
      std::move(block),
      Direction::kForward,
      /*keep_inputs=*/true,
      recording);
  return unpack<Result>(run_node(std::move(state), flat));
}

} // namespace detail

/// Runs a module without keeping its activations: its inputs are kept, and in
/// backward it runs again. For what has no inverse, such as the down-sampling
/// blocks of a RevNet or the arms of a U-Net.
///
/// module is the holder of any module, torch::nn::Sequential or AnyModule,
/// whose forward takes Tensors, one tuple or one vector of Tensors, and returns
/// the like. Recomputation follows every rule of Note [Recomputation]: random
/// numbers, autocast, buffers, hooks, retain_graph and create_graph behave as
/// in the plain module.
///
/// Shapes:   those of the module.
/// Memory:   keeps the inputs, numel * itemsize bytes each, instead of the
///           activations; in backward those of this one module at a time. With
///           early_stop the graph itself is kept, too, without any tensor.
///           What memory_budget has room for comes on top.
/// Accuracy: the same operations on the same values: gradients equal plain ones
///           bit for bit where the module's kernels are deterministic, but for
///           rounding where it is called twice under autocast with its cache,
///           and of LSTM and GRU in float32 with early_stop(false).
/// Throws:   c10::Error if an input, a parameter or a buffer changes between
///           forward and backward.
/// Caution:  a module whose plain members forward changes gives wrong gradients
///           without a word: what is not a registered buffer is not put back.
///           Try a new module once with debug(true). A module that runs a
///           backward pass inside of forward needs early_stop(false), and so
///           does one that calls functions of its own that are noexcept: the
///           second run is ended by an exception.
/// Avoid if: the module is invertible: InvertibleModuleWrapper and
///           ReversibleSequence do not even keep the inputs.
/// Source:   Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost,
///           arXiv:1604.06174.
/// Example:
///   torch::Tensor y = memcnn::checkpoint(down_sampling, x);
template <class Holder, class... Inputs>
auto checkpoint(
    const CheckpointOptions& options,
    const Holder& module,
    const Inputs&... inputs) {
  static_assert(
      detail::is_holder_v<Holder>,
      "memcnn: checkpoint() takes a module holder (as TORCH_MODULE makes it), "
      "a torch::nn::Sequential or a torch::nn::AnyModule, then its inputs.");
  static_assert(
      detail::are_pack_v<Inputs...>,
      "memcnn: the inputs of checkpoint() are Tensors, one std::tuple of "
      "Tensors or one std::vector<Tensor>.");
  using Result =
      std::decay_t<typename detail::forward_result<Holder, Inputs...>::type>;
  static_assert(
      detail::is_pack_v<Result>,
      "memcnn: forward of a module in checkpoint() returns a Tensor, a "
      "std::tuple of Tensors or a std::vector<Tensor>.");

  detail::check_budget(options.memory_budget(), "checkpoint()");
  const auto kept = options.memory_budget() > 0
      ? std::make_shared<detail::KeptSegments>(
            options.memory_budget(), /*graphs=*/0)
      : nullptr;
  auto result = detail::run_checkpointed<Result>(
      "checkpoint()",
      {options.early_stop() && detail::may_throw<Holder, Inputs...>(), kept},
      {options.preserve_rng_state(), options.debug()},
      module,
      inputs...);
  if (kept) {
    kept->end_all(options.kept().get());
  }
  return result;
}

template <
    class Holder,
    class... Inputs,
    class = std::enable_if_t<!std::is_same_v<Holder, CheckpointOptions>>>
auto checkpoint(const Holder& module, const Inputs&... inputs) {
  return checkpoint(CheckpointOptions(), module, inputs...);
}

} // namespace memcnn

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/holder.h>
#include <memcnn/detail/node.h>
#include <memcnn/detail/signature.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/nn/module.h>

#include <functional>
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
};

namespace detail {

/// A module that runs one way only: its inputs are kept, so that the default
/// backward step never asks for the inverse.
class ForwardOnly final : public Invertible {
 public:
  using Call = std::function<Tensors(const Tensors&)>;

  ForwardOnly(std::shared_ptr<torch::nn::Module> module, Call call)
      : module_(std::move(module)), call_(std::move(call)) {}

  Tensors run(Direction direction, Tensors inputs, Recording& recording)
      override {
    TORCH_CHECK(
        direction == Direction::kForward,
        "checkpoint(): expected forward only, but got inverse.");
    return recording.run(/*index=*/0, *module_, std::move(inputs), call_);
  }

  torch::nn::Module& module() override {
    return *module_;
  }

  std::string type_name() const override {
    return module_->name();
  }

 private:
  std::shared_ptr<torch::nn::Module> module_;
  Call call_;
};

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
///           activations; in backward those of this one module at a time.
/// Accuracy: the same operations on the same values: gradients equal plain ones
///           bit for bit where the module's kernels are deterministic.
/// Throws:   c10::Error if an input, a parameter or a buffer changes between
///           forward and backward.
/// Caution:  a module whose plain members forward changes gives wrong gradients
///           without a word: what is not a registered buffer is not put back.
///           Try a new module once with debug(true).
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

  const auto call = [](Holder& holder, const auto&... arguments) -> Result {
    if constexpr (detail::is_any_module_v<Holder>) {
      return holder.template forward<Result>(arguments...);
    } else {
      return holder->forward(arguments...);
    }
  };
  const detail::Tensors flat = detail::pack(inputs...);
  const std::shared_ptr<torch::nn::Module> target = detail::module_of(module);
  Holder handle = module; // of the same module: a holder's forward is not const
  if (!detail::runs_as_node(flat, *target)) {
    return call(handle, inputs...);
  }
  auto block = std::make_shared<detail::ForwardOnly>(
      target, [handle, call](const detail::Tensors& tensors) mutable {
        return detail::pack(detail::Spread<Result(Inputs...)>::call(
            [&](const auto&... arguments) {
              return call(handle, arguments...);
            },
            tensors));
      });
  auto state = c10::make_intrusive<detail::NodeState>(
      "checkpoint()",
      std::move(block),
      Direction::kForward,
      /*keep_inputs=*/true,
      RecordingOptions{options.preserve_rng_state(), options.debug()});
  return detail::unpack<Result>(detail::run_node(std::move(state), flat));
}

template <
    class Holder,
    class... Inputs,
    class = std::enable_if_t<!std::is_same_v<Holder, CheckpointOptions>>>
auto checkpoint(const Holder& module, const Inputs&... inputs) {
  return checkpoint(CheckpointOptions(), module, inputs...);
}

} // namespace memcnn

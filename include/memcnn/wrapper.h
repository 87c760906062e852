// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/budgeted_results.h>
#include <memcnn/detail/configurable.h>
#include <memcnn/detail/free_inputs.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/kept_choice.h>
#include <memcnn/detail/node.h>
#include <memcnn/detail/plain_module.h>
#include <memcnn/detail/printed_options.h>
#include <memcnn/detail/signature.h>
#include <memcnn/detail/tensor_map.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/given.h>
#include <memcnn/invertible.h>
#include <memcnn/kept_activations.h>
#include <memcnn/log_det.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace memcnn {

/// Options of InvertibleModuleWrapper; all may be changed between two calls, and
/// act from the next one on.
struct InvertibleModuleWrapperOptions {
  /// Keeps the input of forward() instead of freeing and rebuilding it. For an
  /// input that is read again before backward. Default: false.
  TORCH_ARG(bool, keep_input) = false;
  /// The same for the input of inverse(). Default: false.
  TORCH_ARG(bool, keep_input_inverse) = false;
  /// Runs the plain module, with ordinary autograd. Default: false.
  TORCH_ARG(bool, disable) = false;
  /// Recomputation draws the random numbers that forward drew. Costs a look at
  /// the generator before and after each branch. Default: true.
  TORCH_ARG(bool, preserve_rng_state) = true;
  /// Compares what branches get and return in backward with what they got and
  /// returned in forward, and stops where they differ: finds state that nobody
  /// registered, and modules that are not invertible. Costs a copy of both,
  /// and one more run of each branch. Default: false.
  TORCH_ARG(bool, debug) = false;
  /// Bytes that may be kept from forward to backward of results of
  /// convolutions, products and attention, which need not be computed again
  /// then: those that save the most work for each byte. Default: 0.
  TORCH_ARG(int64_t, memory_budget) = 0;
};

/// The module behind InvertibleModuleWrapper: the members below have the
/// signatures of the wrapped module's own.
template <
    class M,
    class Forward =
        typename detail::forward_signature<detail::contained_t<M>>::type,
    class Inverse =
        typename detail::inverse_signature<detail::contained_t<M>>::type>
class InvertibleModuleWrapperImpl;

template <class M, class Out, class... Ins, class Back, class... Outs>
class InvertibleModuleWrapperImpl<M, Out(Ins...), Back(Outs...)> final
    : public torch::nn::Cloneable<
          InvertibleModuleWrapperImpl<M, Out(Ins...), Back(Outs...)>>,
      public detail::Configurable<InvertibleModuleWrapperOptions>,
      public detail::ConditionalMap {
  static constexpr auto kConditions =
      static_cast<size_t>(detail::conditions_in_v<Out(Ins...), Back(Outs...)>);
  static constexpr bool kMapsTensor =
      detail::maps_tensor_given_v<Out(Ins...), Back(Outs...)>;

 public:
  explicit InvertibleModuleWrapperImpl(
      M module_,
      InvertibleModuleWrapperOptions options_ = {})
      : Configurable{options_},
        module(std::move(module_)),
        block_(detail::as_invertible(module.ptr())) {
    reset();
  }

  /// The child is named as in Python MemCNN, so that keys of saved states are
  /// the same.
  void reset() override {
    this->register_module("_fn", module.ptr());
  }

  /// The module's forward. Its inputs' memory is freed until backward where
  /// that is safe and keep_input is not set.
  std::decay_t<Out> forward(Ins... inputs) {
    return call<std::decay_t<Out>>(
        Direction::kForward,
        [&] { return module->forward(inputs...); },
        inputs...);
  }

  /// forward(), and its log-determinant, (N): one number a sample. For a module
  /// that maps one tensor to one; it has to be a module of this library, have
  /// this member and inverse_with_log_det() itself, or keep volumes
  /// (PreservesVolume).
  WithLogDet forward_with_log_det(const at::Tensor& input) {
    return map(Direction::kForward, input, {}, /*with_log_det=*/true);
  }

  /// The module's inverse. Its inputs' memory is freed until backward where
  /// that is safe and keep_input_inverse is not set.
  std::decay_t<Back> inverse(Outs... outputs) {
    return call<std::decay_t<Back>>(
        Direction::kInverse,
        [&] { return module->inverse(outputs...); },
        outputs...);
  }

  /// inverse(), and its own log-determinant: the negative of forward's.
  WithLogDet inverse_with_log_det(const at::Tensor& output) {
    return map(Direction::kInverse, output, {}, /*with_log_det=*/true);
  }

  /// What runs the module: a sequence that has the wrapper as a block runs that
  /// instead, with each of its branches on record.
  const std::shared_ptr<Invertible>& invertible() const {
    return block_;
  }

  /// The same four methods under conditions, for a module that maps one tensor to
  /// one.
  Given given(std::vector<at::Tensor> conditions) {
    return {this->weak_from_this().lock(), *this, std::move(conditions)};
  }

  /// Why the last call with a graph kept the memory of an input, in words;
  /// empty if all was freed. For debugging; not for use from several threads.
  std::string input_kept_because() const {
    return kept_because_;
  }

  /// What a memory_budget kept in the last call with a graph: bytes, results of
  /// operators, and what they spare. Can be printed. Not for use from several
  /// threads.
  KeptActivations kept() const {
    return kept_;
  }

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<c10::Device>& device = std::nullopt) const override {
    auto copy = std::make_shared<InvertibleModuleWrapperImpl>(
        detail::clone(module, device), options);
    detail::copy_modes(*this, *copy);
    return copy;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::InvertibleModuleWrapper"
           << detail::PrintedOptions()
                  .add("keep_input", options.keep_input())
                  .add("keep_input_inverse", options.keep_input_inverse())
                  .add("disable", options.disable())
                  .add(
                      "preserve_rng_state",
                      options.preserve_rng_state(),
                      /*standard=*/true)
                  .add("debug", options.debug())
                  .add("memory_budget", options.memory_budget())
                  .add("kept", detail::words_of_kept(kept_));
  }

  using Configurable::options; // as its own, editors offer it early
  M module;

 private:
  template <class Result, class Plain, class... Args>
  Result call(Direction direction, const Plain& plain, const Args&... args) {
    check(direction);
    if (!options.disable()) {
      detail::Tensors inputs = detail::pack(args...);
      if (detail::runs_as_node(inputs, *module)) {
        const detail::Tensors conditions =
            detail::split_off(inputs, kConditions);
        return detail::unpack<Result>(
            run(direction, inputs, conditions, /*with_log_det=*/false));
      }
    }
    return plain();
  }

  WithLogDet map(
      Direction direction,
      const at::Tensor& input,
      const detail::Tensors& conditions,
      bool with_log_det) override {
    check(direction);
    TORCH_CHECK(
        kMapsTensor,
        "InvertibleModuleWrapper::",
        name_of(direction),
        "(): expected a module that maps one tensor to one for its "
        "log-determinant, or for conditions by given(), but got ",
        block_->type_name(),
        ". Join its tensors, or call the module's own members.");
    if (options.disable() ||
        !detail::runs_as_node(detail::joined({input}, conditions), *module)) {
      return detail::run_plainly(
          *block_, direction, input, conditions, with_log_det);
    }
    const bool is_sum = with_log_det && block_->log_det() != LogDet::kZero;
    detail::Tensors outputs = run(direction, {input}, conditions, is_sum);
    WithLogDet result{outputs[0], at::Tensor()};
    if (with_log_det) {
      result.log_det =
          is_sum ? outputs[1] : detail::LogDetSum(outputs[0]).take();
    }
    return result;
  }

  void check(Direction direction) const {
    detail::check_budget(
        options.memory_budget(),
        "InvertibleModuleWrapper::",
        name_of(direction),
        "()");
  }

  /// Runs the module as one node and frees its inputs.
  detail::Tensors run(
      Direction direction,
      const detail::Tensors& inputs,
      const detail::Tensors& conditions,
      bool with_log_det) {
    const bool keep = direction == Direction::kForward
        ? options.keep_input()
        : options.keep_input_inverse();
    auto state = c10::make_intrusive<detail::NodeState>(
        std::string("InvertibleModuleWrapper::") + name_of(direction) + "()",
        block_,
        direction,
        keep,
        RecordingOptions{options.preserve_rng_state(), options.debug()});
    detail::BudgetedResults results(options.memory_budget());
    state->recording.keep_results(results.keeper());
    state->has_log_det = with_log_det;
    detail::Tensors outputs = detail::run_node(state, inputs, conditions);
    kept_ = results.kept();
    kept_because_ = detail::free_inputs(inputs, outputs, *state);
    return outputs;
  }

  std::shared_ptr<Invertible> block_; // keeps the module alive
  const char* kept_because_ = "";
  KeptActivations kept_;
};

namespace detail {

/// The wrapper of a module, which is looked at first, so that a mistake is the
/// first thing that a compiler names.
template <class M>
struct wrapper_of {
  using Forward = typename forward_signature<contained_t<M>>::type;
  using Inverse = typename inverse_signature<contained_t<M>>::type;
  static constexpr bool is_holder = torch::detail::is_module_holder<M>::value;
  static_assert(
      is_holder,
      "memcnn: InvertibleModuleWrapper takes a module holder, as TORCH_MODULE "
      "makes it, not the Impl or a pointer to it, and then its "
      "InvertibleModuleWrapperOptions.");
  static_assert(
      !is_holder || has_inverse_v<contained_t<M>>,
      "memcnn: this module has no inverse(): InvertibleModuleWrapper needs a "
      "module with one non-template, non-overloaded member `inverse` that "
      "takes what forward returns.");
  static_assert(
      !is_holder || has_forward_v<contained_t<M>>,
      "memcnn: this module has no forward() that can be wrapped: it must be "
      "one non-template, non-overloaded member.");
  static_assert(
      std::is_void_v<Forward> || std::is_void_v<Inverse> ||
          (maps_pack_v<Forward> && maps_pack_v<Inverse>),
      "memcnn: forward and inverse of a wrapped module take Tensors, one "
      "std::tuple of Tensors or one std::vector<Tensor>, and return a Tensor, "
      "a std::tuple of Tensors or a std::vector<Tensor>.");
  using type = InvertibleModuleWrapperImpl<M>;
};

} // namespace detail

/// Runs an invertible module as one autograd node that does not keep its input:
/// forward() frees it, backward rebuilds it from the output.
///
/// \f[ x = \mathrm{inverse}(y), \quad y = \mathrm{forward}(x) \f]
///
/// M is the holder of any module with one forward and one inverse member, each
/// of which takes what the other returns: Tensors, one tuple of Tensors or one
/// vector of Tensors. Integer and mask tensors among them are kept.
///
/// Shapes:   those of the module.
/// Dtypes:   those of the module; gradients for floating point tensors.
/// Memory:   keeps the outputs, numel * itemsize bytes each, which the next
///           wrapper frees in turn; frees the inputs where nobody else is seen
///           to need them (Note [Freed inputs] in detail/freed_storage.h).
///           What memory_budget has room for comes on top.
/// Accuracy: gradients are those of the plain module at an input that was
///           rebuilt; check_invertible_module() says how far that is off.
/// Throws:   c10::Error if a freed input is read, or if outputs, parameters or
///           buffers change between forward and backward.
/// Caution:  a module that is not invertible, or a branch whose plain members
///           forward changes, gives wrong gradients without a word: try a new
///           module once with debug(true), or is_invertible_module().
/// Avoid if: the module is one of a long chain of its kind: ReversibleSequence
///           is faster and smaller.
/// Source:   Gomez et al. 2017, The Reversible Residual Network, algorithm 1,
///           arXiv:1707.04585; Python MemCNN 1.5.2. Differs: the fused step, what
///           is freed, random numbers and buffers in the second run.
/// Example:
///   memcnn::InvertibleModuleWrapper block(coupling);
///   torch::Tensor y = block(h); // h, made by a layer, is freed
///   torch::Tensor h_again = block->inverse(y); // so is y
template <class M>
class InvertibleModuleWrapper
    : public torch::nn::ModuleHolder<typename detail::wrapper_of<M>::type> {
 public:
  using Impl = typename detail::wrapper_of<M>::type;
  using torch::nn::ModuleHolder<Impl>::ModuleHolder;
};
template <class M>
InvertibleModuleWrapper(M, InvertibleModuleWrapperOptions = {})
    -> InvertibleModuleWrapper<M>;
// Whatever else it is made of is no holder, of which wrapper_of has words.
template <class M, class Second, class... Others>
InvertibleModuleWrapper(M, Second, Others...)
    -> InvertibleModuleWrapper<std::tuple<M, Second, Others...>>;

} // namespace memcnn

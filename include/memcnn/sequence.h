// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/chain.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/node.h>
#include <memcnn/detail/plain_module.h>
#include <memcnn/detail/signature.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace memcnn {

/// Options of ReversibleSequence; all may be changed between two calls, and act
/// from the next one on.
struct ReversibleSequenceOptions {
  /// Recomputation draws the random numbers that forward drew. Costs a look at
  /// the generator before and after each branch. Default: true.
  TORCH_ARG(bool, preserve_rng_state) = true;
  /// Compares what branches get and return in backward with what they got and
  /// returned in forward, and stops where they differ: finds state that nobody
  /// registered, and blocks that are not invertible. Costs a copy of both, and
  /// one more run of each branch. Default: false.
  TORCH_ARG(bool, debug) = false;
  /// Runs the plain modules, with ordinary autograd. Default: false.
  TORCH_ARG(bool, disable) = false;
  /// Bytes of activations that may be kept from forward to backward, so that
  /// the last blocks need not run again: from 0, the least memory, to what the
  /// plain modules keep, at their speed. Default: 0.
  TORCH_ARG(int64_t, memory_budget) = 0;
  /// The memory format in which halves travel between couplings; input and
  /// output keep theirs. at::MemoryFormat::ChannelsLast makes convolutions on a
  /// CPU faster. Default: that of the input.
  TORCH_ARG(std::optional<at::MemoryFormat>, memory_format) = std::nullopt;
};

/// The module behind ReversibleSequence.
class ReversibleSequenceImpl final
    : public torch::nn::Cloneable<ReversibleSequenceImpl>,
      public Invertible {
 public:
  ReversibleSequenceImpl() = default;

  /// Blocks, with the options before or after them.
  template <class... Arguments>
  explicit ReversibleSequenceImpl(Arguments... arguments) {
    (take(std::move(arguments)), ...);
  }

  /// Adds a block to the end: the holder of an invertible module that maps one
  /// Tensor to one Tensor.
  template <class M>
  void push_back(M block) {
    using Contained = detail::contained_t<M>;
    static_assert(
        torch::detail::is_module_holder<M>::value,
        "memcnn: ReversibleSequence takes module holders, as TORCH_MODULE "
        "makes them.");
    static_assert(
        !torch::detail::is_module_holder<M>::value ||
            detail::has_inverse_v<Contained>,
        "memcnn: this module has no inverse(): ReversibleSequence needs "
        "modules with one non-template, non-overloaded member `inverse`. For "
        "others there is memcnn::checkpoint().");
    static_assert(
        !torch::detail::is_module_holder<M>::value ||
            detail::has_forward_v<Contained>,
        "memcnn: this module has no forward() that a ReversibleSequence can "
        "run: it must be one non-template, non-overloaded member.");
    static_assert(
        !detail::has_inverse_v<Contained> ||
            !detail::has_forward_v<Contained> ||
            (detail::maps_tensor_v<
                 typename detail::forward_signature<Contained>::type> &&
             detail::maps_tensor_v<
                 typename detail::inverse_signature<Contained>::type>),
        "memcnn: forward and inverse of a block in a ReversibleSequence take "
        "one Tensor and return one.");
    add(block_of<M>(block.ptr()));
  }

  /// How many blocks the chain has.
  size_t size() const {
    return chain_.size();
  }

  /// The children are registered by push_back().
  void reset() override {}

  at::Tensor forward(const at::Tensor& input) {
    return call(Direction::kForward, input);
  }

  /// Undoes forward(), and saves memory likewise.
  at::Tensor inverse(const at::Tensor& output) {
    return call(Direction::kInverse, output);
  }

  std::vector<at::Tensor> run(
      Direction direction,
      std::vector<at::Tensor> inputs,
      Recording& recording) override {
    return {chain_.run(direction, std::move(inputs[0]), recording, settings())};
  }

  BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) override {
    if (after.kept_inputs[0].defined()) {
      return Invertible::backward_step(
          direction, std::move(after), recording, parameters);
    }
    return chain_.backward_step(
        direction, std::move(after), recording, parameters);
  }

  /// How many blocks kept their activations in the last forward or inverse
  /// that recorded a graph.
  size_t kept_blocks() const {
    return chain_.kept_blocks();
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return "ReversibleSequence";
  }

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<c10::Device>& device = std::nullopt) const override {
    auto copy = std::make_shared<ReversibleSequenceImpl>(options);
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const size_t first = first_use(blocks_[i].module);
      copy->add(first < i ? copy->blocks_[first] : blocks_[i].clone(device));
    }
    detail::copy_modes(*this, *copy);
    return copy;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::ReversibleSequence(preserve_rng_state="
           << detail::yes_no(options.preserve_rng_state())
           << ", disable=" << detail::yes_no(options.disable())
           << ", memory_budget=" << options.memory_budget();
    if (options.debug()) {
      stream << ", debug=true";
    }
    if (options.memory_format()) {
      stream << ", memory_format=" << *options.memory_format();
    }
    stream << ")";
  }

  ReversibleSequenceOptions options;

 private:
  /// A block, as a module and as what the chain runs.
  struct Block {
    std::shared_ptr<torch::nn::Module> module;
    std::shared_ptr<Invertible> invertible;
    std::function<Block(const std::optional<c10::Device>&)> clone;
  };

  template <class Argument>
  void take(Argument argument) {
    if constexpr (std::is_same_v<Argument, ReversibleSequenceOptions>) {
      options = argument;
    } else {
      push_back(std::move(argument));
    }
  }

  /// The block of a module whose holder is an M.
  template <class M>
  static Block block_of(const std::shared_ptr<detail::contained_t<M>>& module) {
    return {
        module,
        detail::as_invertible(module),
        [module](const std::optional<c10::Device>& device) {
          return block_of<M>(detail::clone(M(module), device).ptr());
        }};
  }

  /// One module used twice is one child: registered twice, its parameters would
  /// be stepped twice.
  void add(Block block) {
    const size_t i = blocks_.size();
    if (first_use(block.module) == i) {
      register_module(std::to_string(i), block.module);
    }
    chain_.push_back(block.invertible);
    blocks_.push_back(std::move(block));
  }

  /// The first block that is this module; the number of blocks if none is.
  size_t first_use(const std::shared_ptr<torch::nn::Module>& module) const {
    size_t first = 0;
    while (first < blocks_.size() && blocks_[first].module != module) {
      ++first;
    }
    return first;
  }

  detail::ChainSettings settings() const {
    return {options.memory_budget(), options.memory_format(), is_training()};
  }

  at::Tensor call(Direction direction, const at::Tensor& input) {
    check(direction);
    if (options.disable() || !detail::records_graph({input}, *this)) {
      Recording off = Recording::off();
      return run(direction, {input}, off)[0];
    }
    auto state = c10::make_intrusive<detail::NodeState>(
        std::string("ReversibleSequence::") + name_of(direction) + "()",
        std::static_pointer_cast<ReversibleSequenceImpl>(shared_from_this()),
        direction,
        /*keep_inputs=*/false,
        RecordingOptions{options.preserve_rng_state(), options.debug()});
    return detail::run_node(std::move(state), {input})[0];
  }

  void check(Direction direction) const {
    TORCH_CHECK(
        !blocks_.empty(),
        "ReversibleSequence::",
        name_of(direction),
        "(): expected at least one block, but got none. Add blocks with "
        "push_back().");
    TORCH_CHECK_VALUE(
        options.memory_budget() >= 0,
        "ReversibleSequence::",
        name_of(direction),
        "(): expected a memory_budget of 0 or more bytes, but got ",
        options.memory_budget(),
        ". 0 keeps no activations.");
  }

  std::vector<Block> blocks_;
  detail::Chain chain_;
};

/// Runs a chain of invertible modules as one autograd node that keeps its last
/// output only: backward rebuilds everything else from it, block by block.
///
/// \f[ y = f_n(\dots f_1(x)), \quad x = f_1^{-1}(\dots f_n^{-1}(y)) \f]
///
/// Shapes:   blocks map one Tensor to one Tensor, each what the next one takes.
/// Dtypes:   those of the blocks.
/// Memory:   keeps numel(y) * itemsize bytes until backward, whatever the depth,
///           and the activations of as many last blocks as memory_budget has
///           room for; nothing that a caller holds is freed. Between couplings
///           of the same split_dim the halves travel as two tensors, updated in
///           place (Note [Streams of a sequence] in
///           detail/streams.h). They are
///           copies of the input's halves, for which a memory_format costs
///           nothing more.
/// Accuracy: gradients at inputs rebuilt through all later blocks: the error
///           grows with depth; in float64 it stays below 1e-10 at depth 20.
/// Throws:   c10::Error that names the block, counted from 0, if one fails.
/// Caution:  a block that is not invertible, or a branch whose plain members
///           forward changes, gives wrong gradients without a word: try a new
///           network once with debug(true), or is_invertible_module().
/// Avoid if: a layer between the blocks has no inverse: use one sequence for
///           each run of invertible blocks, or InvertibleModuleWrapper.
/// Source:   Gomez et al. 2017, The Reversible Residual Network, algorithm 1,
///           arXiv:1707.04585. Python MemCNN has no such class.
/// Example:
///   memcnn::ReversibleSequence trunk(coupling_a, coupling_b);
///   trunk->push_back(coupling_c);
///   torch::Tensor z = trunk(x);
class ReversibleSequence
    : public torch::nn::ModuleHolder<ReversibleSequenceImpl> {
 public:
  using torch::nn::ModuleHolder<ReversibleSequenceImpl>::ModuleHolder;
  using Impl = ReversibleSequenceImpl;
};

} // namespace memcnn

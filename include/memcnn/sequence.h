// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/any_invertible.h>
#include <memcnn/detail/chain.h>
#include <memcnn/detail/configurable.h>
#include <memcnn/detail/folded.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/kept_choice.h>
#include <memcnn/detail/node.h>
#include <memcnn/detail/printed_options.h>
#include <memcnn/detail/tensor_map.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/kept_activations.h>
#include <memcnn/log_det.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/ordered_dict.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
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
  /// Bytes that may be kept from forward to backward of what need not be
  /// computed again then, results of convolutions and products first: from 0,
  /// the least memory, to what the plain modules keep, at their speed.
  /// Default: 0.
  TORCH_ARG(int64_t, memory_budget) = 0;
  /// Keeps what every anchor_every-th block returns, from which backward goes on:
  /// for blocks whose inverse loses digits, as a 1x1 convolution of large
  /// condition does, since errors multiply from block to block. Costs as many
  /// tensors of the size of the output. Default: 0, the output alone.
  TORCH_ARG(int64_t, anchor_every) = 0;
  /// The memory format in which halves travel between couplings; input and
  /// output keep theirs. at::MemoryFormat::ChannelsLast makes convolutions on a
  /// CPU faster. Default: that of the input.
  TORCH_ARG(std::optional<at::MemoryFormat>, memory_format) = std::nullopt;
};

namespace detail {

/// True for a type that a block may be asked for as. For others an error of the
/// compiler.
template <class T>
struct is_type_of_block : std::true_type {
  static_assert(
      torch::detail::is_module<T>::value,
      "memcnn: at() and ptr() of a ReversibleSequence take the type of the "
      "module, such as ScaleImpl, not that of its holder.");
};

} // namespace detail

/// The module behind ReversibleSequence.
class ReversibleSequenceImpl final
    : public torch::nn::Cloneable<ReversibleSequenceImpl>,
      public detail::Configurable<ReversibleSequenceOptions>,
      public detail::TensorMap {
 public:
  using Iterator = std::vector<AnyInvertible>::iterator;
  using ConstIterator = std::vector<AnyInvertible>::const_iterator;

  ReversibleSequenceImpl() = default;

  /// Blocks, or an OrderedDict of them with their names; the options before or
  /// after them.
  template <class... Arguments>
  explicit ReversibleSequenceImpl(Arguments... arguments) {
    (take(std::move(arguments)), ...);
  }

  /// Blocks with their names.
  explicit ReversibleSequenceImpl(
      std::initializer_list<std::pair<std::string, AnyInvertible>> blocks,
      const ReversibleSequenceOptions& options_ = {})
      : Configurable{options_} {
    for (const auto& [name, block] : blocks) {
      push_back(name, block);
    }
  }

  at::Tensor forward(const at::Tensor& input) {
    return TensorMap::forward(input); // AnyModule wants it of this class
  }

  /// Adds a block to the end: an invertible module that maps one Tensor to one
  /// Tensor, by its holder, by a shared pointer, or by itself. The i-th block
  /// becomes the child i.
  void push_back(AnyInvertible block) {
    push_back(std::to_string(size()), std::move(block));
  }

  /// Likewise, and says which of the conditions that given() binds the block
  /// gets, counted from 0. Without a word it is as many as its branches take, in
  /// their order; none where that does not show, as it does not for a Sequential.
  void push_back(AnyInvertible block, std::vector<size_t> conditions) {
    push_back(std::to_string(size()), std::move(block), std::move(conditions));
  }
  void push_back(
      const std::string& name,
      AnyInvertible block,
      std::vector<size_t> conditions) {
    block.conditions_ = std::move(conditions);
    push_back(name, std::move(block));
  }

  /// Likewise, as a child of that name. One module used twice is one child, of
  /// its first name: registered twice, its parameters would be stepped twice.
  void push_back(const std::string& name, AnyInvertible block) {
    if (first_use(*block.ptr()) == size()) {
      register_module(name, block.ptr());
    }
    chain_.push_back(block.invertible_, block.conditions_);
    blocks_.push_back(std::move(block));
  }

  /// Adds every block of a container; those of another sequence with push_back()
  /// names.
  template <class Container>
  void extend(const Container& container) {
    // Copied first: the container may be this sequence.
    std::vector<AnyInvertible> blocks(
        std::begin(container), std::end(container));
    for (AnyInvertible& block : blocks) {
      push_back(std::move(block));
    }
  }

  /// Iterates over the blocks, in the order of forward().
  Iterator begin() {
    return blocks_.begin();
  }
  ConstIterator begin() const {
    return blocks_.begin();
  }
  Iterator end() {
    return blocks_.end();
  }
  ConstIterator end() const {
    return blocks_.end();
  }

  /// The i-th block as a module of type T. Throws c10::IndexError if there is no
  /// such block, c10::Error if it is of another type.
  template <class T>
  T& at(size_t index) {
    static_assert(detail::is_type_of_block<T>::value);
    return blocks_[checked("at", index)].template get<T>();
  }
  template <class T>
  const T& at(size_t index) const {
    static_assert(detail::is_type_of_block<T>::value);
    return blocks_[checked("at", index)].template get<T>();
  }

  /// The i-th block. Throws as at() does.
  std::shared_ptr<torch::nn::Module> ptr(size_t index) const {
    return blocks_[checked("ptr", index)].ptr();
  }
  template <class T>
  std::shared_ptr<T> ptr(size_t index) const {
    static_assert(detail::is_type_of_block<T>::value);
    return blocks_[checked("ptr", index)].template ptr<T>();
  }
  std::shared_ptr<torch::nn::Module> operator[](size_t index) const {
    return ptr(index);
  }

  size_t size() const noexcept {
    return blocks_.size();
  }

  bool is_empty() const noexcept {
    return blocks_.empty();
  }

  /// What a memory_budget kept in the last forward or inverse that recorded a
  /// graph: bytes, whole blocks, results of operators, and what they spare. Can
  /// be printed.
  KeptActivations kept() const {
    return chain_.kept();
  }

  /// How many blocks kept all their activations in it.
  size_t kept_blocks() const {
    return kept().blocks;
  }

  /// The children are registered by push_back().
  void reset() override {}

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<c10::Device>& device = std::nullopt) const override {
    auto copy = std::make_shared<ReversibleSequenceImpl>(options);
    const auto children = named_children();
    for (const AnyInvertible& block : blocks_) {
      const auto module = block.ptr();
      const size_t first = first_use(*module);
      copy->push_back(
          name_in(children, *module),
          first < copy->size() ? copy->blocks_[first] : block.clone(device));
    }
    detail::copy_modes(*this, *copy);
    return copy;
  }

  /// Its options, and what the budget kept; operator<< adds the blocks.
  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::ReversibleSequence"
           << detail::PrintedOptions()
                  .add(
                      "preserve_rng_state",
                      options.preserve_rng_state(),
                      /*standard=*/true)
                  .add("debug", options.debug())
                  .add("disable", options.disable())
                  .add("memory_budget", options.memory_budget())
                  .add("anchor_every", options.anchor_every())
                  .add("kept", detail::words_of_kept(kept()))
                  .add("memory_format", options.memory_format());
  }

  using Configurable::options; // as its own, editors offer it early

 private:
  // What a node around it asks of an Invertible; for users there are forward()
  // and inverse().
  std::vector<at::Tensor> run_with(
      Direction direction,
      std::vector<at::Tensor> inputs,
      const RunExtras& extras,
      Recording& recording) override {
    check(direction);
    return {chain_.run(
        direction, std::move(inputs[0]), extras, recording, settings())};
  }

  LogDet log_det() const override {
    return chain_.log_det();
  }

  std::optional<size_t> condition_count() const override {
    return chain_.condition_count();
  }

  bool takes_halves_along(int64_t /*dim*/) const override {
    return false;
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

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return "ReversibleSequence";
  }

  std::optional<int64_t> takes_halves_of() const override {
    return std::nullopt;
  }

  void take(const ReversibleSequenceOptions& given) {
    options = given;
  }
  template <class Block>
  void take(torch::OrderedDict<std::string, Block> blocks) {
    for (auto& named : blocks) {
      push_back(named.key(), std::move(named.value()));
    }
  }
  template <class Block>
  void take(Block block) {
    push_back(std::move(block));
  }

  /// The first block that is this module; the number of blocks if none is.
  size_t first_use(const torch::nn::Module& module) const {
    size_t first = 0;
    while (first < size() && blocks_[first].ptr().get() != &module) {
      ++first;
    }
    return first;
  }

  static std::string name_in(
      const torch::OrderedDict<std::string, std::shared_ptr<torch::nn::Module>>&
          children,
      const torch::nn::Module& module) {
    for (const auto& child : children) {
      if (child.value().get() == &module) {
        return child.key();
      }
    }
    return {};
  }

  size_t checked(const char* method, size_t index) const {
    TORCH_CHECK_INDEX(
        index < size(),
        "ReversibleSequence::",
        method,
        "(): expected an index below the number of blocks, ",
        size(),
        ", but got ",
        index,
        ". Count from 0.");
    return index;
  }

  detail::ChainSettings settings() const {
    return {
        options.memory_budget(),
        options.memory_format(),
        is_training(),
        options.anchor_every()};
  }

  WithLogDet map(
      Direction direction,
      const at::Tensor& input,
      const std::vector<at::Tensor>& conditions,
      bool with_log_det) override {
    check(direction);
    if (options.disable() ||
        !detail::runs_as_node(detail::joined({input}, conditions), *this)) {
      return TensorMap::map(direction, input, conditions, with_log_det);
    }
    return chain_.run_as_nodes(
        direction,
        input,
        conditions,
        with_log_det,
        RecordingOptions{options.preserve_rng_state(), options.debug()},
        settings());
  }

  void check(Direction direction) const {
    TORCH_CHECK(
        !is_empty(),
        "ReversibleSequence::",
        name_of(direction),
        "(): expected at least one block, but got none. Add blocks with "
        "push_back().");
    TORCH_CHECK_VALUE(
        options.anchor_every() >= 0,
        "ReversibleSequence::",
        name_of(direction),
        "(): expected anchor_every of at least 0 blocks, but got ",
        options.anchor_every(),
        ". 0 keeps the output alone.");
    detail::check_budget(
        options.memory_budget(),
        "ReversibleSequence::",
        name_of(direction),
        "()");
  }

  std::vector<AnyInvertible> blocks_;
  detail::Chain chain_;
};

/// Prints a sequence as LibTorch prints modules, but blocks that print alike once,
/// with their count: "(0-8): 9 x memcnn::AdditiveCoupling(...)". Inside of
/// another module it prints as LibTorch does, one block after the other.
inline std::ostream& operator<<(
    std::ostream& stream,
    const ReversibleSequenceImpl& sequence) {
  detail::print_folded(stream, sequence, /*indentation=*/"");
  return stream;
}

/// Runs a chain of invertible modules that keeps its last output only: backward
/// rebuilds everything else from it, block by block, and each block is an
/// autograd node (Note [Nodes of a chain] in detail/chain_nodes.h).
///
/// \f[ y = f_n(\dots f_1(x)), \quad x = f_1^{-1}(\dots f_n^{-1}(y)) \f]
///
/// Shapes:   blocks map one Tensor to one Tensor, each what the next one takes.
/// Dtypes:   those of the blocks.
/// Memory:   keeps numel(y) * itemsize bytes until backward, whatever the depth,
///           and what memory_budget has room for (Note [Memory budget] in
///           detail/kept_blocks.h); nothing that a caller holds is freed.
///           Between couplings of the same split_dim the halves travel as two
///           tensors, updated in place (Note [Streams of a sequence] in
///           detail/streams.h). They are copies of the input's halves, for
///           which a memory_format costs nothing more.
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
///   trunk->push_back("last", coupling_c);
///   torch::Tensor z = trunk(x);
class ReversibleSequence
    : public torch::nn::ModuleHolder<ReversibleSequenceImpl> {
 public:
  using torch::nn::ModuleHolder<ReversibleSequenceImpl>::ModuleHolder;
  using Impl = ReversibleSequenceImpl;

  ReversibleSequence() = default;
  ReversibleSequence(
      std::initializer_list<std::pair<std::string, AnyInvertible>> blocks,
      const ReversibleSequenceOptions& options = {})
      : ModuleHolder(
            std::make_shared<ReversibleSequenceImpl>(blocks, options)) {}

  /// Not for use: blocks in braces without names. An array, since a
  /// std::initializer_list would take those of ReversibleSequence{a, b}.
  template <class Block, size_t n, class... Options>
  explicit ReversibleSequence(Block (&&)[n], const Options&...)
      : ModuleHolder(nullptr) {
    static_assert(
        n == 0, // never
        "memcnn: blocks of a ReversibleSequence are in braces with their names, "
        "{{\"a\", a}, {\"b\", b}}; without names they are its arguments.");
  }
};

inline std::ostream& operator<<(
    std::ostream& stream,
    const ReversibleSequence& sequence) {
  return stream << *sequence;
}

} // namespace memcnn

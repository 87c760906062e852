// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/autocast_state.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/gradient.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/kept_window.h>
#include <memcnn/detail/node.h>
#include <memcnn/detail/plain_module.h>
#include <memcnn/detail/recording.h>
#include <memcnn/detail/signature.h>
#include <memcnn/detail/streams.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace memcnn {

/// Options of ReversibleSequence; all may be changed between two calls.
struct ReversibleSequenceOptions {
  /// Recomputation draws the random numbers that forward drew. Costs a look at
  /// the generator before and after each branch. Default: true.
  TORCH_ARG(bool, preserve_rng_state) = true;
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

  explicit ReversibleSequenceImpl(ReversibleSequenceOptions options_)
      : options(options_) {}

  template <
      class... Blocks,
      class = std::enable_if_t<
          (torch::detail::is_module_holder<Blocks>::value && ...)>>
  explicit ReversibleSequenceImpl(
      ReversibleSequenceOptions options_,
      Blocks... blocks)
      : options(options_) {
    (push_back(std::move(blocks)), ...);
  }

  template <
      class First,
      class... Rest,
      class = std::enable_if_t<
          torch::detail::is_module_holder<First>::value &&
          (torch::detail::is_module_holder<Rest>::value && ...)>>
  explicit ReversibleSequenceImpl(First first, Rest... rest)
      : ReversibleSequenceImpl(
            ReversibleSequenceOptions(),
            std::move(first),
            std::move(rest)...) {}

  /// Adds a block to the end: the holder of an invertible module that maps one
  /// Tensor to one Tensor.
  template <class M>
  void push_back(M block) {
    using Contained = detail::contained_t<M>;
    static_assert(
        torch::detail::is_module_holder<M>::value,
        "memcnn: ReversibleSequence takes module holders, as TORCH_MODULE "
        "makes "
        "them.");
    static_assert(
        !torch::detail::is_module_holder<M>::value ||
            detail::has_inverse_v<Contained>,
        "memcnn: this module has no inverse(): ReversibleSequence needs "
        "modules "
        "with one non-template, non-overloaded member `inverse`. For others "
        "there is memcnn::checkpoint().");
    static_assert(
        detail::maps_tensor_v<
            typename detail::forward_signature<Contained>::type> &&
            detail::maps_tensor_v<
                typename detail::inverse_signature<Contained>::type>,
        "memcnn: forward and inverse of a block in a ReversibleSequence take "
        "one "
        "Tensor and return one.");
    std::shared_ptr<Contained> module = block.ptr();
    stages_.push_back(
        {detail::as_invertible(module), module, [module](const auto& device) {
           return ReversibleSequenceImpl::cloned_stage<M>(M(module), device);
         }});
    register_stage();
  }

  /// How many blocks the chain has.
  size_t size() const {
    return stages_.size();
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
      detail::Recording& recording) override {
    std::optional<detail::KeptWindow> window;
    // Inside a block that keeps its graph anyway there is nothing to decide.
    if (recording.is_recording() && options.memory_budget() > 0 &&
        !at::GradMode::is_enabled()) {
      window.emplace(options.memory_budget(), first_kept(direction, inputs[0]));
    }
    check_format(direction, inputs[0]);
    detail::Streams streams(std::move(inputs[0]), options.memory_format());
    for (size_t k = 0; k < stages_.size(); ++k) {
      const size_t i = stage_at(direction, k);
      at_stage(name_of(direction), i, [&] {
        Invertible& map = *stages_[i].map;
        std::vector<at::Tensor> taken = streams.take_for(map);
        streams.set(
            window ? window->run(
                         map, direction, std::move(taken), recording.stage(i))
                   : map.run(direction, std::move(taken), recording.stage(i)));
      });
    }
    if (window && window->is_measured()) {
      plan_.first_kept = stages_.size() - window->size();
    }
    if (recording.is_recording()) {
      kept_blocks_ = window ? window->size() : 0;
    }
    return {streams.take_whole()};
  }

  BackwardOutput backward_step(
      Direction direction,
      BackwardInput given,
      detail::Recording& recording,
      detail::ParameterGradients& parameters) override {
    if (given.kept_inputs[0].defined()) {
      return Invertible::backward_step(
          direction, std::move(given), recording, parameters);
    }
    detail::Streams values(
        std::move(given.outputs[0]), options.memory_format());
    detail::Streams grads(
        std::move(given.grad_outputs[0]), options.memory_format());
    for (size_t k = stages_.size(); k-- > 0;) {
      const size_t i = stage_at(direction, k);
      at_stage("backward", i, [&] {
        Invertible& map = *stages_[i].map;
        BackwardInput stage;
        stage.outputs = values.take_for(map);
        stage.grad_outputs = grads.take_for(map);
        stage.kept_inputs.resize(stage.outputs.size());
        stage.needs_grad.assign(
            stage.outputs.size(), k > 0 || given.needs_grad[0]);
        stage.retain_graph = given.retain_graph;
        BackwardOutput before = recording.stage(i).kept
            ? detail::kept_backward_step(
                  map, std::move(stage), recording.stage(i), parameters)
            : map.backward_step(
                  direction, std::move(stage), recording.stage(i), parameters);
        values.set(std::move(before.inputs));
        grads.set(std::move(before.grad_inputs));
      });
    }
    return {{values.take_whole()}, {grads.take_whole()}};
  }

  /// How many blocks kept their activations in the last forward or inverse
  /// that recorded a graph.
  size_t kept_blocks() const {
    return kept_blocks_;
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
    for (size_t i = 0; i < stages_.size(); ++i) {
      const size_t first = first_use(i);
      copy->stages_.push_back(
          first < i ? copy->stages_[first] : stages_[i].clone(device));
      copy->register_stage();
    }
    detail::copy_modes(*this, *copy);
    return copy;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::ReversibleSequence(preserve_rng_state="
           << detail::yes_no(options.preserve_rng_state())
           << ", disable=" << detail::yes_no(options.disable())
           << ", memory_budget=" << options.memory_budget();
    if (options.memory_format()) {
      stream << ", memory_format=" << *options.memory_format();
    }
    stream << ")";
  }

  ReversibleSequenceOptions options;

 private:
  struct Stage {
    std::shared_ptr<Invertible> map;
    std::shared_ptr<torch::nn::Module> module;
    std::function<Stage(const std::optional<c10::Device>&)> clone;
  };

  template <class M>
  static Stage cloned_stage(
      const M& block,
      const std::optional<c10::Device>& device) {
    std::shared_ptr<detail::contained_t<M>> module =
        detail::clone(block, device).ptr();
    return {detail::as_invertible(module), module, [module](const auto& to) {
              return cloned_stage<M>(M(module), to);
            }};
  }

  /// The first stage that is the same module as stage i.
  size_t first_use(size_t i) const {
    size_t first = 0;
    while (stages_[first].module != stages_[i].module) {
      ++first;
    }
    return first;
  }

  /// Registers the last stage as a child. One block used twice is one child:
  /// registered twice, its parameters would be stepped twice.
  void register_stage() {
    const size_t last = stages_.size() - 1;
    if (first_use(last) == last) {
      register_module(std::to_string(last), stages_[last].module);
    }
  }

  void check_format(Direction direction, const at::Tensor& input) const {
    const auto format = options.memory_format();
    const int64_t dims = format == at::MemoryFormat::ChannelsLast ? 4
        : format == at::MemoryFormat::ChannelsLast3d              ? 5
                                                                  : input.dim();
    TORCH_CHECK_VALUE(
        format != at::MemoryFormat::Preserve,
        "ReversibleSequence::",
        name_of(direction),
        "(): expected a memory_format to convert to, but got Preserve. Set "
        "none "
        "for that of the input.");
    TORCH_CHECK_VALUE(
        input.dim() == dims,
        "ReversibleSequence::",
        name_of(direction),
        "(): expected an input of ",
        dims,
        " dims for its memory_format, but got ",
        detail::describe(input),
        ". Set ChannelsLast for images (N, C, H, W), ChannelsLast3d for "
        "volumes, "
        "or no memory_format.");
  }

  /// The k-th stage to run in a direction.
  size_t stage_at(Direction direction, size_t k) const {
    return direction == Direction::kForward ? k : stages_.size() - 1 - k;
  }

  /// Runs what a stage does; a failure says where it was.
  template <class Fn>
  void at_stage(const char* method, size_t i, Fn&& fn) const {
    const auto place = [&] {
      return c10::str(
          "ReversibleSequence::",
          method,
          "(): block ",
          i,
          " (",
          stages_[i].map->type_name(),
          ")");
    };
    try {
      fn();
    } catch (c10::Error& error) {
      error.add_context(place());
      throw;
    } catch (const std::exception& error) {
      // Other types cannot be told where: in backward, where the caller is far
      // away, the place matters more than the type.
      TORCH_CHECK(
          method != std::string("backward"), place(), ": ", error.what());
      throw;
    }
  }

  /// From which stage on blocks are worth keeping, in order of the direction:
  /// known from the last run, if that was of the same kind.
  size_t first_kept(Direction direction, const at::Tensor& input) {
    Plan plan;
    plan.direction = direction;
    plan.budget = options.memory_budget();
    plan.sizes = input.sizes().vec();
    plan.dtype = input.scalar_type();
    plan.autocast = detail::is_autocast_on(input.device());
    plan.training = is_training();
    plan.blocks = stages_.size();
    const bool same = std::tie(
                          plan.direction,
                          plan.budget,
                          plan.sizes,
                          plan.dtype,
                          plan.autocast,
                          plan.training,
                          plan.blocks) ==
        std::tie(plan_.direction,
                 plan_.budget,
                 plan_.sizes,
                 plan_.dtype,
                 plan_.autocast,
                 plan_.training,
                 plan_.blocks);
    plan.first_kept = same ? plan_.first_kept : 0;
    plan_ = std::move(plan);
    return plan_.first_kept;
  }

  at::Tensor call(Direction direction, const at::Tensor& input) {
    TORCH_CHECK(
        !stages_.empty(),
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
    if (options.disable() || !detail::records_graph({input}, *this)) {
      detail::Recording off = detail::Recording::off();
      return run(direction, {input}, off)[0];
    }
    auto state = c10::make_intrusive<detail::NodeState>(
        std::string("ReversibleSequence::") + name_of(direction) + "()",
        std::static_pointer_cast<ReversibleSequenceImpl>(shared_from_this()),
        direction,
        /*keep_inputs=*/false,
        options.preserve_rng_state());
    return detail::run_node(std::move(state), {input}, *this)[0];
  }

  /// What a memory budget came to for one kind of run.
  struct Plan {
    Direction direction = Direction::kForward;
    int64_t budget = -1;
    std::vector<int64_t> sizes;
    at::ScalarType dtype = at::kFloat;
    bool autocast = false;
    bool training = false;
    size_t blocks = 0;
    size_t first_kept = 0; // in the order of the direction
  };

  std::vector<Stage> stages_;
  Plan plan_;
  size_t kept_blocks_ = 0;
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
///           place (Note [Streams of a sequence] in docs/design.md). They are
///           copies of the input's halves, for which a memory_format costs
///           nothing more.
/// Accuracy: gradients at inputs rebuilt through all later blocks: the error
///           grows with depth; in float64 it stays below 1e-10 at depth 20.
/// Throws:   c10::Error that names the block, counted from 0, if one fails.
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

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/checkpoint.h>
#include <memcnn/detail/at_place.h>
#include <memcnn/detail/kept_choice.h>
#include <memcnn/detail/kept_segments.h>
#include <memcnn/detail/signature.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/sequential.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace memcnn {

/// Options of checkpoint_sequential().
struct CheckpointSequentialOptions {
  /// In how many segments the modules run, of as many modules each as can be:
  /// from 1 to the number of modules. Default: about the square root of it.
  TORCH_ARG(std::optional<int64_t>, segments) = std::nullopt;
  /// Bytes of activations that may be kept from forward to backward, beside the
  /// inputs of segments: what saves the most work for each byte, be it results
  /// as in CheckpointOptions or, with early_stop, all that a segment saves, which
  /// then need not run again. Default: the last segment alone keeps all that it
  /// saves, whatever it takes.
  TORCH_ARG(std::optional<int64_t>, memory_budget) = std::nullopt;
  /// As in CheckpointOptions. Default: nowhere.
  TORCH_ARG(std::shared_ptr<KeptActivations>, kept) = nullptr;
  /// As in CheckpointOptions. Default: true.
  TORCH_ARG(bool, preserve_rng_state) = true;
  /// As in CheckpointOptions. Default: false.
  TORCH_ARG(bool, debug) = false;
  /// As in CheckpointOptions. Default: true.
  TORCH_ARG(bool, early_stop) = true;
};

namespace detail {

/// Whether a call of checkpoint_sequential() begins as one of its two forms does.
template <class... Arguments>
inline constexpr bool is_sequential_call_v = false;
template <class First, class Second, class... Inputs>
inline constexpr bool is_sequential_call_v<First, Second, Inputs...> =
    (std::is_convertible_v<First, torch::nn::Sequential> &&
     std::is_convertible_v<Second, int64_t>) ||
    (std::is_convertible_v<First, CheckpointSequentialOptions> &&
     std::is_convertible_v<Second, torch::nn::Sequential>);

/// The modules of a Sequential in segments, and how they run.
class Segments {
 public:
  Segments(
      const torch::nn::Sequential& modules,
      const CheckpointSequentialOptions& options)
      : modules_(modules->begin(), modules->end()), options_(options) {
    check();
    if (options.memory_budget()) {
      kept_ = std::make_shared<KeptSegments>(
          *options.memory_budget(), /*graphs=*/count());
    }
  }

  int64_t count() const {
    const auto modules = static_cast<double>(modules_.size());
    return options_.segments().value_or(std::llround(std::sqrt(modules)));
  }

  /// Runs segment k.
  template <class... Inputs>
  at::Tensor run(int64_t k, const Inputs&... inputs) const {
    torch::nn::Sequential segment;
    for (int64_t i = first(k); i < first(k + 1); ++i) {
      segment->push_back(modules_[static_cast<size_t>(i)]);
    }
    const auto here = [&] {
      return place(k);
    };
    return at_place(here, [&] {
      // What the last one keeps is used at once, before any other runs again:
      // the peak is that of its second run, which it is spared.
      return k + 1 == count() && !kept_
          ? segment->forward(inputs...)
          : run_checkpointed<at::Tensor>(
                here(),
                {options_.early_stop(), kept_},
                {options_.preserve_rng_state(), options_.debug()},
                segment,
                inputs...);
    });
  }

  /// All of them ran.
  void end() const {
    if (kept_) {
      kept_->end_all(options_.kept().get());
    }
  }

 private:
  /// The first module of segment k.
  int64_t first(int64_t k) const {
    return k * static_cast<int64_t>(modules_.size()) / count();
  }

  /// "checkpoint_sequential(): segment 1 (modules 2 to 4)"
  std::string place(int64_t k) const {
    return c10::str(
        "checkpoint_sequential(): segment ",
        k,
        " (modules ",
        first(k),
        " to ",
        first(k + 1) - 1,
        ")");
  }

  void check() const {
    TORCH_CHECK_VALUE(
        !modules_.empty(),
        "checkpoint_sequential(): expected a Sequential of at least one module, "
        "but got an empty one. Add modules with push_back().");
    TORCH_CHECK_VALUE(
        count() >= 1 && count() <= static_cast<int64_t>(modules_.size()),
        "checkpoint_sequential(): expected from 1 to ",
        modules_.size(),
        " segments, which is the number of modules, but got ",
        count(),
        ". Set segments to a number of these.");
    check_budget(
        options_.memory_budget().value_or(0), "checkpoint_sequential()");
  }

  std::vector<torch::nn::AnyModule> modules_;
  CheckpointSequentialOptions options_;
  std::shared_ptr<KeptSegments> kept_; // within a budget
};

} // namespace detail

/// Runs the modules of a torch::nn::Sequential in segments, each as one
/// checkpoint(): what lies between two segments is kept, and each segment runs
/// again in backward. The last one keeps its activations instead, which
/// backward needs first; or a memory_budget decides what is kept.
///
/// All that checkpoint() says of a module holds for each segment. What goes from
/// one segment to the next is a Tensor, and so is the result; the first module
/// may take several.
///
/// Shapes:   those of the modules.
/// Memory:   keeps the input of each segment but the last, and the activations
///           of the last one; in backward those of one segment at a time.
/// Accuracy: as checkpoint().
/// Throws:   c10::ValueError if there are fewer modules than segments; what
///           checkpoint() throws, with the number of the segment, from 0.
/// Caution:  a segment may not begin with a module that works in place, such as
///           ReLU(inplace): its input is kept.
/// Avoid if: the modules are invertible: ReversibleSequence keeps no inputs.
/// Source:   Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost,
///           section 3, arXiv:1604.06174; torch.utils.checkpoint, whose last
///           segment takes what does not divide evenly.
/// Example:
///   torch::Tensor y = memcnn::checkpoint_sequential(layers, 4, x);
template <class... Inputs>
at::Tensor checkpoint_sequential(
    const CheckpointSequentialOptions& options,
    const torch::nn::Sequential& modules,
    const Inputs&... inputs) {
  static_assert(
      detail::are_pack_v<Inputs...>,
      "memcnn: the inputs of checkpoint_sequential() are Tensors, one "
      "std::tuple of Tensors or one std::vector<Tensor>.");
  const detail::Segments segments(modules, options);
  at::Tensor x = segments.run(0, inputs...);
  for (int64_t k = 1; k < segments.count(); ++k) {
    x = segments.run(k, x);
  }
  segments.end();
  return x;
}

template <class... Inputs>
at::Tensor checkpoint_sequential(
    const torch::nn::Sequential& modules,
    int64_t segments,
    const Inputs&... inputs) {
  return checkpoint_sequential(
      CheckpointSequentialOptions().segments(segments), modules, inputs...);
}

/// Any other call, so that the compiler says what is wrong with it.
template <
    class... Arguments,
    class = std::enable_if_t<!detail::is_sequential_call_v<Arguments...>>>
at::Tensor checkpoint_sequential(const Arguments&...) {
  static_assert(
      detail::is_sequential_call_v<Arguments...>,
      "memcnn: checkpoint_sequential() takes a torch::nn::Sequential, a number "
      "of segments and the inputs, or CheckpointSequentialOptions, a Sequential "
      "and the inputs, in this order.");
  return {};
}

} // namespace memcnn

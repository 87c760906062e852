// SPDX-License-Identifier: MIT
#pragma once

// Reversible residual networks for 32 x 32 images. This file needs LibTorch and
// memcnn only: copy it into a project that links memcnn::memcnn.

#include <memcnn/memcnn.h>

#include <torch/nn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace revnet {

/// How reversible blocks run. The network, its weights and their names are the
/// same under each.
enum class Engine {
  kSequence, // memcnn::ReversibleSequence: keeps the output of a run of blocks
  kWrapper, // memcnn::InvertibleModuleWrapper: every block frees its input
  kPlain, // ordinary autograd: all activations are kept
};

inline std::ostream& operator<<(std::ostream& stream, Engine engine) {
  switch (engine) {
    case Engine::kSequence:
      return stream << "sequence";
    case Engine::kWrapper:
      return stream << "wrapper";
    case Engine::kPlain:
      return stream << "plain";
  }
  return stream;
}

/// What sets one reversible network apart from another.
struct RevNetOptions {
  /// Classes to tell apart, 1 or more, default 10.
  TORCH_ARG(int64_t, num_classes) = 10;
  /// Channels after the first convolution, even, default 32.
  TORCH_ARG(int64_t, stem) = 32;
  /// Width of the blocks of each group, even, default 32, 64, 112. Groups after
  /// the first halve the image.
  TORCH_ARG(std::vector<int64_t>, widths) = {32, 64, 112};
  /// Blocks of each group, 1 or more, as many entries as `widths`, default 3,
  /// 3, 3.
  TORCH_ARG(std::vector<int64_t>, blocks) = {3, 3, 3};
  /// Whether a branch is 1x1, 3x3, 1x1 with four times the width between
  /// blocks, or two 3x3 (default).
  TORCH_ARG(bool, bottleneck) = false;
  /// How reversible blocks run, default kSequence.
  TORCH_ARG(Engine, engine) = Engine::kSequence;
  /// Rounds the streams of reversible blocks to multiples of 2^-fractional_bits
  /// (12 to 16 suit float32), so that every engine computes the same gradients
  /// bit for bit; an error where values are too large for that. Default: none.
  TORCH_ARG(std::optional<int64_t>, fractional_bits) = std::nullopt;
  /// Bytes of activations that the reversible blocks of each group may keep
  /// under kSequence, so that the last blocks of the group need not run again.
  /// The same for all, so that later groups, whose blocks keep less and compute
  /// more per byte, are kept whole first. Default: 0.
  TORCH_ARG(int64_t, memory_budget) = 0;
  /// Whether blocks that change the shape recompute their activations, too, and
  /// keep their input only, under any engine. Default: false.
  TORCH_ARG(bool, checkpoint_transitions) = false;
};

/// Names that named() knows.
inline const std::vector<std::string>& names() {
  static const std::vector<std::string> all{
      "revnet38", "revnet110", "revnet164"};
  return all;
}

/// Returns the options of a published network, or throws c10::ValueError.
inline RevNetOptions named(const std::string& name) {
  if (name == "revnet38") {
    return RevNetOptions().widths({32, 64, 112}).blocks({3, 3, 3});
  }
  if (name == "revnet110") {
    return RevNetOptions().widths({32, 64, 128}).blocks({9, 9, 9});
  }
  if (name == "revnet164") {
    return RevNetOptions()
        .widths({32, 64, 128})
        .blocks({9, 9, 9})
        .bottleneck(true);
  }
  TORCH_CHECK_VALUE(
      false,
      "revnet::named(): expected a name out of ",
      names(),
      ", but got \"",
      name,
      "\".");
}

namespace detail {

inline constexpr int64_t kExpansion = 4; // of a bottleneck

/// A convolution that keeps the image size at stride 1, He-initialised.
inline torch::nn::Conv2d
convolution(int64_t in, int64_t out, int64_t kernel, int64_t stride = 1) {
  torch::nn::Conv2d layer(torch::nn::Conv2dOptions(in, out, kernel)
                              .stride(stride)
                              .padding(kernel / 2)
                              .bias(false));
  const double fan_out = static_cast<double>(kernel * kernel * out);
  torch::nn::init::normal_(layer->weight, 0.0, std::sqrt(2.0 / fan_out));
  return layer;
}

/// Batch normalisation and ReLU in place. That costs no memory: the first does
/// not need its output in backward, and the second only that.
inline void push_activation(torch::nn::Sequential& layers, int64_t channels) {
  layers->push_back(torch::nn::BatchNorm2d(channels));
  layers->push_back(torch::nn::ReLU(torch::nn::ReLUOptions(/*inplace=*/true)));
}

} // namespace detail

/// What a branch does to its input.
struct BranchOptions {
  BranchOptions(int64_t in_channels, int64_t width)
      : in_channels_(in_channels), width_(width) {}

  /// Channels of the input.
  TORCH_ARG(int64_t, in_channels);
  /// Channels of the convolutions.
  TORCH_ARG(int64_t, width);
  /// Step of the first 3x3 convolution, 1 (default) or 2.
  TORCH_ARG(int64_t, stride) = 1;
  /// As in RevNetOptions.
  TORCH_ARG(bool, bottleneck) = false;
  /// Whether BN and ReLU come first (default). Not so in the very first block,
  /// which follows a BN and a ReLU.
  TORCH_ARG(bool, preactivation) = true;

 public:
  int64_t out_channels() const {
    return bottleneck_ ? detail::kExpansion * width_ : width_;
  }
  bool changes_shape() const {
    return stride_ != 1 || in_channels_ != out_channels();
  }
  /// The same on half the channels.
  BranchOptions halved() const {
    return BranchOptions(in_channels_ / 2, width_ / 2)
        .stride(stride_)
        .bottleneck(bottleneck_)
        .preactivation(preactivation_);
  }
};

/// Runs two or three convolutions, each after BN and ReLU: the F and G of a
/// coupling, and the residual of a block that changes shape.
///
/// Shapes:   input (N, in_channels, H, W); output (N, out_channels, H / stride,
///           W / stride).
/// Dtypes:   floating point.
/// Memory:   with a graph, keeps two tensors per convolution for backward.
/// Source:   He et al. 2016, "Identity Mappings in Deep Residual Networks",
///           arXiv:1603.05027.
class BranchImpl final : public torch::nn::Cloneable<BranchImpl> {
 public:
  explicit BranchImpl(const BranchOptions& options_) : options(options_) {
    reset();
  }

  void reset() override {
    const int64_t in = options.in_channels();
    const int64_t width = options.width();
    const int64_t out = options.out_channels();

    torch::nn::Sequential chain;
    if (options.preactivation()) {
      detail::push_activation(chain, in);
    }
    if (options.bottleneck()) {
      chain->push_back(detail::convolution(in, width, 1));
      detail::push_activation(chain, width);
      chain->push_back(detail::convolution(width, width, 3, options.stride()));
      detail::push_activation(chain, width);
      chain->push_back(detail::convolution(width, out, 1));
    } else {
      chain->push_back(detail::convolution(in, width, 3, options.stride()));
      detail::push_activation(chain, width);
      chain->push_back(detail::convolution(width, out, 3));
    }
    layers = register_module("layers", chain);
  }

  torch::Tensor forward(torch::Tensor x) {
    return layers->forward(x);
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "revnet::Branch(" << options.in_channels() << " -> "
           << options.out_channels() << ", stride=" << options.stride()
           << ", bottleneck=" << std::boolalpha << options.bottleneck() << ")";
  }

  BranchOptions options;
  torch::nn::Sequential layers{nullptr};
};

TORCH_MODULE(Branch);

/// Changes the shape: a branch added to a 1x1 convolution of the input. Has no
/// inverse, so it keeps its activations, or with `checkpoint` its input.
///
/// Shapes:   input (N, in_channels, H, W); output (N, out_channels, H / stride,
///           W / stride).
/// Dtypes:   floating point.
/// Memory:   keeps the input for backward and, unless it is a checkpoint, two
///           tensors per convolution.
/// Source:   Gomez et al. 2017, "The Reversible Residual Network", section 3.3,
///           arXiv:1707.04585.
class TransitionImpl final : public torch::nn::Cloneable<TransitionImpl> {
 public:
  TransitionImpl(const BranchOptions& options_, bool checkpoint_)
      : options(options_), checkpoint(checkpoint_) {
    reset();
  }

  void reset() override {
    branch = register_module("branch", Branch(options));
    shortcut = register_module(
        "shortcut",
        torch::nn::Sequential(
            detail::convolution(
                options.in_channels(),
                options.out_channels(),
                1,
                options.stride()),
            torch::nn::BatchNorm2d(options.out_channels())));
  }

  torch::Tensor forward(torch::Tensor x) {
    if (checkpoint) {
      return memcnn::checkpoint(branch, x).add_(
          memcnn::checkpoint(shortcut, x));
    }
    return branch->forward(x).add_(shortcut->forward(x));
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "revnet::Transition(" << options.in_channels() << " -> "
           << options.out_channels() << ", stride=" << options.stride()
           << ", checkpoint=" << std::boolalpha << checkpoint << ")";
  }

  BranchOptions options;
  bool checkpoint;
  Branch branch{nullptr};
  torch::nn::Sequential shortcut{nullptr};
};

TORCH_MODULE(Transition);

/// What sets one run of reversible blocks apart from another.
struct ReversibleRunOptions {
  ReversibleRunOptions(const BranchOptions& first_block, int64_t blocks)
      : first_block_(first_block), blocks_(blocks) {}

  /// The first block on all channels; the others have a preactivation.
  TORCH_ARG(BranchOptions, first_block);
  /// How many blocks, 1 or more.
  TORCH_ARG(int64_t, blocks);
  /// As in RevNetOptions.
  TORCH_ARG(Engine, engine) = Engine::kSequence;
  /// As in RevNetOptions.
  TORCH_ARG(std::optional<int64_t>, fractional_bits) = std::nullopt;
  /// Bytes of activations that this run may keep, default 0.
  TORCH_ARG(int64_t, memory_budget) = 0;
};

/// Blocks that keep the shape, one after the other: additive couplings of two
/// branches on half the channels.
///
/// Shapes:   input, output (N, C, H, W), C even.
/// Dtypes:   floating point.
/// Memory:   keeps the output for backward, and what the budget allows; all
///           activations if plain.
/// Source:   Gomez et al. 2017, "The Reversible Residual Network", section 3.2,
///           arXiv:1707.04585.
class ReversibleRunImpl final : public torch::nn::Cloneable<ReversibleRunImpl> {
 public:
  using Coupling = memcnn::AdditiveCoupling<Branch, Branch>;

  explicit ReversibleRunImpl(const ReversibleRunOptions& options_)
      : options(options_) {
    reset();
  }

  void reset() override {
    memcnn::ReversibleSequence chain(
        memcnn::ReversibleSequenceOptions()
            .disable(options.engine() != Engine::kSequence)
            .memory_budget(options.memory_budget()));
    BranchOptions branch = options.first_block().halved();
    for (int64_t index = 0; index < options.blocks(); ++index) {
      chain->push_back(Coupling(
          Branch(branch),
          Branch(branch),
          memcnn::CouplingOptions().fractional_bits(
              options.fractional_bits())));
      branch.preactivation(true);
    }
    blocks = register_module("blocks", chain);
  }

  torch::Tensor forward(torch::Tensor x) {
    if (options.engine() != Engine::kWrapper) {
      return blocks->forward(x);
    }
    // Networks of wrappers usually have them as children. They hold nothing of
    // their own, though, so that they can as well be made here: the weights
    // then have the same names under every engine.
    for (const auto& block : blocks->children()) {
      Coupling coupling(std::dynamic_pointer_cast<Coupling::Impl>(block));
      x = memcnn::InvertibleModuleWrapper<Coupling>(coupling)->forward(x);
    }
    return x;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "revnet::ReversibleRun(blocks=" << options.blocks()
           << ", engine=" << options.engine() << ")";
  }

  ReversibleRunOptions options;
  memcnn::ReversibleSequence blocks{nullptr};
};

TORCH_MODULE(ReversibleRun);

/// Classifies images with a chain of residual blocks that are reversible but
/// for the first one of a group, where the shape changes.
///
/// Shapes:   input (N, 3, H, W), H and W multiples of 4; output (N,
///           num_classes), logits.
/// Dtypes:   floating point.
/// Memory:   keeps the activations of stem, transitions and head, and one
///           tensor per group, however many blocks the groups have.
/// Throws:   c10::ValueError if an option is out of its range; with
///           fractional_bits if values leave the range in which it is exact.
/// Avoid if: memory is no concern: a step takes the time of one more forward.
/// Source:   Gomez et al. 2017, "The Reversible Residual Network",
///           arXiv:1707.04585.
/// Example:
///   revnet::RevNet net(revnet::named("revnet38").num_classes(100));
///   torch::Tensor logits = net(images);
class RevNetImpl final : public torch::nn::Cloneable<RevNetImpl> {
 public:
  explicit RevNetImpl(const RevNetOptions& options_ = {}) : options(options_) {
    reset();
  }

  void reset() override {
    TORCH_CHECK_VALUE(
        options.widths().size() == options.blocks().size(),
        "RevNet::reset(): expected as many entries in blocks as in widths, "
        "but got ",
        options.blocks().size(),
        " and ",
        options.widths().size(),
        ".");
    TORCH_CHECK_VALUE(
        std::all_of(
            options.blocks().begin(),
            options.blocks().end(),
            [](int64_t blocks) { return blocks >= 1; }),
        "RevNet::reset(): expected 1 or more blocks in each group, but got ",
        options.blocks(),
        ".");
    TORCH_CHECK_VALUE(
        options.memory_budget() >= 0,
        "RevNet::reset(): expected memory_budget to be 0 or more bytes, but "
        "got ",
        options.memory_budget(),
        ".");
    int64_t channels = options.stem();
    torch::nn::Sequential first(detail::convolution(3, channels, 3));
    detail::push_activation(first, channels);
    stem = register_module("stem", first);

    torch::nn::Sequential chain;
    for (size_t group = 0; group < options.widths().size(); ++group) {
      const auto block_after = [&](int64_t in_channels) {
        return BranchOptions(in_channels, options.widths()[group])
            .bottleneck(options.bottleneck());
      };
      int64_t blocks = options.blocks()[group];
      BranchOptions block = block_after(channels)
                                .stride(group > 0 ? 2 : 1)
                                .preactivation(group > 0);
      channels = block.out_channels();
      if (block.changes_shape()) {
        chain->push_back(Transition(block, options.checkpoint_transitions()));
        block = block_after(channels);
        --blocks;
      }
      if (blocks > 0) {
        chain->push_back(
            ReversibleRun(ReversibleRunOptions(block, blocks)
                              .engine(options.engine())
                              .fractional_bits(options.fractional_bits())
                              .memory_budget(options.memory_budget())));
      }
    }
    trunk = register_module("trunk", chain);

    torch::nn::Sequential last;
    detail::push_activation(last, channels);
    last->push_back(torch::nn::AdaptiveAvgPool2d(1));
    last->push_back(torch::nn::Flatten());
    last->push_back(torch::nn::Linear(channels, options.num_classes()));
    head = register_module("head", last);
  }

  torch::Tensor forward(torch::Tensor images) {
    auto x = stem->forward(images); // (N, stem, H, W)
    x = trunk->forward(x); // (N, C, H / 4, W / 4)
    return head->forward(x); // (N, num_classes)
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "revnet::RevNet(num_classes=" << options.num_classes()
           << ", stem=" << options.stem()
           << ", widths=" << c10::IntArrayRef(options.widths())
           << ", blocks=" << c10::IntArrayRef(options.blocks())
           << ", bottleneck=" << std::boolalpha << options.bottleneck()
           << ", engine=" << options.engine();
    if (options.fractional_bits()) {
      stream << ", fractional_bits=" << *options.fractional_bits();
    }
    stream << ", memory_budget=" << options.memory_budget()
           << ", checkpoint_transitions=" << options.checkpoint_transitions()
           << ")";
  }

  RevNetOptions options;
  torch::nn::Sequential stem{nullptr};
  torch::nn::Sequential trunk{nullptr};
  torch::nn::Sequential head{nullptr};
};

TORCH_MODULE(RevNet);

} // namespace revnet

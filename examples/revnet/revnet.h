// SPDX-License-Identifier: MIT
#pragma once

// Residual networks for 32 x 32 images, reversible and ordinary ones:
//
//   images -> stem -> trunk -> head -> logits
//
// The trunk is a chain of residual blocks, x + F(x). In a reversible network
// those that keep the shape are additive couplings of two halves of x, which
// backward can undo, so that it needs no stored activations.
//
// Copy this file into a project that links memcnn::memcnn: it needs no other.

#include <memcnn/memcnn.h>

#include <torch/nn.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace revnet {

/// How reversible blocks run. The network, its weights and their names are the
/// same under each, and under plain autograd (memcnn::PlainAutogradGuard).
enum class Engine {
  kSequence, // memcnn::ReversibleSequence: keeps the output of a run of blocks
  kWrapper, // memcnn::InvertibleModuleWrapper: every block frees its input
};

inline std::ostream& operator<<(std::ostream& stream, Engine engine) {
  constexpr const char* kNames[] = {"sequence", "wrapper"};
  return stream << kNames[static_cast<int>(engine)];
}

/// What sets one network apart from another.
struct RevNetOptions {
  /// Classes to tell apart, 1 or more, default 10.
  TORCH_ARG(int64_t, num_classes) = 10;
  /// Channels after the first convolution, even if reversible, default 32.
  TORCH_ARG(int64_t, stem) = 32;
  /// Width of the blocks of each group, even if reversible, default 32, 64,
  /// 112. Groups after the first halve the image.
  TORCH_ARG(std::vector<int64_t>, widths) = {32, 64, 112};
  /// Blocks of each of these groups, 1 or more, default 3, 3, 3.
  TORCH_ARG(std::vector<int64_t>, blocks) = {3, 3, 3};
  /// Whether a branch is 1x1, 3x3, 1x1 with four times the width between
  /// blocks, or two 3x3 (default).
  TORCH_ARG(bool, bottleneck) = false;
  /// Whether blocks that keep the shape are couplings (default), or residual
  /// blocks like the others: such a network is a ResNet. It keeps all
  /// activations and has none of the next three options.
  TORCH_ARG(bool, reversible) = true;
  /// How reversible blocks run, default kSequence.
  TORCH_ARG(Engine, engine) = Engine::kSequence;
  /// Rounds the streams of reversible blocks to multiples of 2^-fractional_bits
  /// (12 to 16 suit float32), so that every engine computes the same gradients
  /// bit for bit; an error where values are too large for that. Default: none.
  TORCH_ARG(std::optional<int64_t>, fractional_bits) = std::nullopt;
  /// Bytes that each group may keep under kSequence of what it would compute
  /// again in backward, default none. Later groups spare more for each byte.
  TORCH_ARG(std::vector<int64_t>, memory_budgets) = {};
  /// Whether blocks that change the shape recompute their activations, too, and
  /// keep their input only, under any engine. Default: false.
  TORCH_ARG(bool, checkpoint_transitions) = false;
};

inline std::ostream& operator<<(
    std::ostream& stream,
    const RevNetOptions& options) {
  stream << std::boolalpha << "num_classes=" << options.num_classes()
         << ", stem=" << options.stem()
         << ", widths=" << c10::IntArrayRef(options.widths())
         << ", blocks=" << c10::IntArrayRef(options.blocks())
         << ", bottleneck=" << options.bottleneck()
         << ", checkpoint_transitions=" << options.checkpoint_transitions()
         << ", reversible=" << options.reversible();
  if (options.reversible()) {
    stream << ", engine=" << options.engine()
           << ", memory_budgets=" << c10::IntArrayRef(options.memory_budgets());
  }
  if (options.fractional_bits()) {
    stream << ", fractional_bits=" << *options.fractional_bits();
  }
  return stream;
}

/// The published networks, by name.
inline const torch::OrderedDict<std::string, RevNetOptions>& published() {
  using Options = RevNetOptions;
  static const auto resnet =
      Options().reversible(false).stem(16).widths({16, 32, 64});
  static const auto revnet = Options().stem(32).widths({32, 64, 128});
  static const torch::OrderedDict<std::string, Options> all{
      {"resnet32", Options(resnet).blocks({5, 5, 5})},
      {"resnet110", Options(resnet).blocks({18, 18, 18})},
      {"resnet164", Options(resnet).blocks({18, 18, 18}).bottleneck(true)},
      {"revnet38", Options(revnet).widths({32, 64, 112}).blocks({3, 3, 3})},
      {"revnet110", Options(revnet).blocks({9, 9, 9})},
      {"revnet164", Options(revnet).blocks({9, 9, 9}).bottleneck(true)}};
  return all;
}

/// Names that named() knows.
inline std::vector<std::string> names() {
  return published().keys();
}

/// Returns the options of a published network, or throws c10::ValueError.
inline RevNetOptions named(const std::string& name) {
  const RevNetOptions* options = published().find(name);
  TORCH_CHECK_VALUE(
      options != nullptr,
      "revnet::named(): expected a name out of ",
      names(),
      ", but got \"",
      name,
      "\".");
  return *options;
}

/// What the branch of a block, the F of x + F(x), does to its input.
struct BranchOptions {
  int64_t in_channels;
  int64_t width; // channels of the convolutions
  int64_t stride; // of the first 3x3 convolution
  bool bottleneck; // as in RevNetOptions
  bool preactivation; // BN and ReLU come first; not so right after the stem

  int64_t out_channels() const {
    return bottleneck ? 4 * width : width;
  }
  bool changes_shape() const {
    return stride != 1 || in_channels != out_channels();
  }
  /// The same on half the channels.
  BranchOptions halved() const {
    return {in_channels / 2, width / 2, stride, bottleneck, preactivation};
  }
};

namespace detail {

/// A convolution that keeps the image size at stride 1, He-initialised.
inline torch::nn::Conv2d
convolution(int64_t in, int64_t out, int64_t kernel, int64_t stride = 1) {
  auto options = torch::nn::Conv2dOptions(in, out, kernel).bias(false);
  torch::nn::Conv2d layer(options.stride(stride).padding(kernel / 2));
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

/// Two or three convolutions, each after BN and ReLU.
inline torch::nn::Sequential make_branch(const BranchOptions& options) {
  torch::nn::Sequential layers;
  int64_t channels = options.in_channels;
  const auto push = [&](int64_t out, int64_t kernel, int64_t stride) {
    if (options.preactivation || !layers->is_empty()) {
      push_activation(layers, channels);
    }
    layers->push_back(convolution(channels, out, kernel, stride));
    channels = out;
  };
  if (options.bottleneck) {
    push(options.width, /*kernel=*/1, /*stride=*/1);
  }
  push(options.width, /*kernel=*/3, options.stride);
  push(options.out_channels(), options.bottleneck ? 1 : 3, /*stride=*/1);
  return layers;
}

} // namespace detail

/// Adds F(x) to x, or to a 1x1 convolution of x where the shape changes.
///
/// Shapes:   input (N, in_channels, H, W); output (N, out_channels, H / stride,
///           W / stride).
/// Memory:   keeps the input for backward and two tensors per convolution; with
///           checkpoint, a block that changes the shape keeps its input only.
/// Source:   He et al. 2016, "Identity Mappings in Deep Residual Networks",
///           arXiv:1603.05027.
class ResidualBlockImpl final : public torch::nn::Cloneable<ResidualBlockImpl> {
 public:
  ResidualBlockImpl(const BranchOptions& options_, bool checkpoint_)
      : options(options_), checkpoint(checkpoint_) {
    reset();
  }

  void reset() override {
    branch = register_module("branch", detail::make_branch(options));
    shortcut = nullptr;
    if (options.changes_shape()) {
      shortcut = torch::nn::Sequential(
          detail::convolution(
              options.in_channels, options.out_channels(), 1, options.stride),
          torch::nn::BatchNorm2d(options.out_channels()));
      register_module("shortcut", shortcut);
    }
  }

  torch::Tensor forward(torch::Tensor x) {
    const auto run = [&](torch::nn::Sequential& layers) {
      return checkpoint && shortcut ? memcnn::checkpoint(layers, x)
                                    : layers->forward(x);
    };
    auto y = run(branch);
    return y.add_(shortcut ? run(shortcut) : x);
  }

  BranchOptions options;
  bool checkpoint;
  torch::nn::Sequential branch{nullptr};
  torch::nn::Sequential shortcut{nullptr}; // where the shape changes
};

TORCH_MODULE(ResidualBlock);

/// Blocks that keep the shape, one after the other: additive couplings of two
/// branches on half the channels.
///
/// Shapes:   input, output (N, C, H, W), C even.
/// Memory:   keeps the output for backward and what the budget allows, or all.
class ReversibleBlocksImpl final
    : public torch::nn::Cloneable<ReversibleBlocksImpl> {
 public:
  using Coupling = memcnn::AdditiveCoupling<torch::nn::Sequential>;

  /// `branches_` are those of residual blocks, on all channels.
  ReversibleBlocksImpl(
      const std::vector<BranchOptions>& branches_,
      const RevNetOptions& options_,
      int64_t memory_budget_)
      : branches(branches_), options(options_), memory_budget(memory_budget_) {
    reset();
  }

  void reset() override {
    memcnn::ReversibleSequence chain(
        memcnn::ReversibleSequenceOptions().memory_budget(memory_budget));
    const auto coupling =
        memcnn::CouplingOptions().fractional_bits(options.fractional_bits());
    for (const BranchOptions& branch : branches) {
      // In this order, for the same weights on every compiler.
      auto g = detail::make_branch(branch.halved());
      auto f = detail::make_branch(branch.halved());
      chain->push_back(Coupling(std::move(f), std::move(g), coupling));
    }
    blocks = register_module("blocks", chain);
  }

  torch::Tensor forward(torch::Tensor x) {
    if (options.engine() != Engine::kWrapper) {
      return blocks->forward(x);
    }
    // Made here, not as children, wrappers leave the names of weights alone.
    for (const memcnn::AnyInvertible& block : *blocks) {
      x = memcnn::InvertibleModuleWrapper(block.get<Coupling>())->forward(x);
    }
    return x;
  }

  std::vector<BranchOptions> branches;
  RevNetOptions options;
  int64_t memory_budget;
  memcnn::ReversibleSequence blocks{nullptr};
};

TORCH_MODULE(ReversibleBlocks);

/// Classifies images with a chain of residual blocks, which are reversible but
/// for the first one of a group, where the shape changes.
///
/// Shapes:   input (N, 3, H, W), H and W multiples of 4; output (N,
///           num_classes), logits.
/// Dtypes:   floating point.
/// Memory:   keeps the activations of stem, transitions and head, and one
///           tensor per group of any length; if plain, those of all blocks.
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
    check_options();
    torch::nn::Sequential first(detail::convolution(3, options.stem(), 3));
    detail::push_activation(first, options.stem());
    stem = register_module("stem", first);

    torch::nn::Sequential chain;
    int64_t channels = options.stem();
    for (size_t group = 0; group < options.widths().size(); ++group) {
      channels = push_group(chain, group, channels);
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
    stream << "revnet::RevNet(" << options << ")";
  }

  RevNetOptions options;
  torch::nn::Sequential stem{nullptr};
  torch::nn::Sequential trunk{nullptr};
  torch::nn::Sequential head{nullptr};

 private:
  void check_options() const {
    const auto found = c10::str(", but got ", options, ".");
    const auto expect = [&](bool holds, const char* what) {
      TORCH_CHECK_VALUE(holds, "RevNet::reset(): expected ", what, found);
    };
    expect(
        options.widths().size() == options.blocks().size(),
        "as many entries in blocks as in widths");
    const std::vector<int64_t>& budgets = options.memory_budgets();
    expect(
        budgets.empty() || budgets.size() == options.widths().size(),
        "as many entries in memory_budgets as in widths, or none");
    bool even = options.stem() % 2 == 0;
    for (size_t group = 0; group < options.widths().size(); ++group) {
      expect(options.blocks()[group] >= 1, "1 or more blocks in each group");
      expect(budgets.empty() || budgets[group] >= 0, "no negative budget");
      even = even && options.widths()[group] % 2 == 0;
    }
    expect(
        even || !options.reversible(),
        "an even stem and even widths, which couplings halve");
    expect(
        options.reversible() ||
            (options.engine() != Engine::kWrapper &&
             !options.fractional_bits() && budgets.empty()),
        "reversible(true) with kWrapper, fractional_bits or memory_budgets");
  }

  /// Appends the blocks of a group and returns the channels of its output.
  int64_t
  push_group(torch::nn::Sequential& chain, size_t group, int64_t channels) {
    std::vector<BranchOptions> reversible;
    for (int64_t index = 0; index < options.blocks()[group]; ++index) {
      BranchOptions block;
      block.in_channels = channels;
      block.width = options.widths()[group];
      block.stride = group > 0 && index == 0 ? 2 : 1;
      block.bottleneck = options.bottleneck();
      block.preactivation = group > 0 || index > 0;
      channels = block.out_channels();
      if (options.reversible() && !block.changes_shape()) {
        reversible.push_back(block);
      } else {
        chain->push_back(
            ResidualBlock(block, options.checkpoint_transitions()));
      }
    }
    if (!reversible.empty()) {
      const std::vector<int64_t>& budgets = options.memory_budgets();
      chain->push_back(ReversibleBlocks(
          reversible, options, budgets.empty() ? 0 : budgets[group]));
    }
    return channels;
  }
};

TORCH_MODULE(RevNet);

} // namespace revnet

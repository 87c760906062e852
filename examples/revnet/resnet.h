// SPDX-License-Identifier: MIT
#pragma once

// Residual networks for 32 x 32 images. This file needs LibTorch only: copy it
// into a project as it is. (revnet.h has layers of the same kind of its own, so
// that each of the two files stands alone.)

#include <torch/nn.h>

#include <cmath>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

namespace resnet {

/// What sets one residual network apart from another.
struct ResNetOptions {
  /// Classes to tell apart, 1 or more, default 10.
  TORCH_ARG(int64_t, num_classes) = 10;
  /// Channels after the first convolution, default 16.
  TORCH_ARG(int64_t, stem) = 16;
  /// Width of the convolutions of each group, default 16, 32, 64. Groups after
  /// the first halve the image.
  TORCH_ARG(std::vector<int64_t>, widths) = {16, 32, 64};
  /// Blocks of each group, as many entries as `widths`, default 5, 5, 5.
  TORCH_ARG(std::vector<int64_t>, blocks) = {5, 5, 5};
  /// Whether a block is 1x1, 3x3, 1x1 with four times the width between
  /// blocks, or two 3x3 (default).
  TORCH_ARG(bool, bottleneck) = false;
};

/// Names that named() knows.
inline const std::vector<std::string>& names() {
  static const std::vector<std::string> all{
      "resnet32", "resnet110", "resnet164"};
  return all;
}

/// Returns the options of a published network, or throws c10::ValueError.
inline ResNetOptions named(const std::string& name) {
  if (name == "resnet32") {
    return ResNetOptions().blocks({5, 5, 5});
  }
  if (name == "resnet110") {
    return ResNetOptions().blocks({18, 18, 18});
  }
  if (name == "resnet164") {
    return ResNetOptions().blocks({18, 18, 18}).bottleneck(true);
  }
  TORCH_CHECK_VALUE(
      false,
      "resnet::named(): expected a name out of ",
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

/// What a block does to its input.
struct BlockOptions {
  BlockOptions(int64_t in_channels, int64_t width)
      : in_channels_(in_channels), width_(width) {}

  /// Channels of the input.
  TORCH_ARG(int64_t, in_channels);
  /// Channels of the convolutions.
  TORCH_ARG(int64_t, width);
  /// Step of the first 3x3 convolution, 1 (default) or 2.
  TORCH_ARG(int64_t, stride) = 1;
  /// As in ResNetOptions.
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
};

/// Adds to its input what two or three convolutions make of it.
///
/// \f[ y = S(x) + F(x) \f] with S the identity, or a 1x1 convolution and BN
/// where the shape changes.
///
/// Shapes:   input (N, in_channels, H, W); output (N, out_channels, H / stride,
///           W / stride).
/// Dtypes:   floating point.
/// Memory:   keeps the input and two tensors per convolution for backward.
/// Source:   He et al. 2016, "Identity Mappings in Deep Residual Networks",
///           arXiv:1603.05027.
class BlockImpl final : public torch::nn::Cloneable<BlockImpl> {
 public:
  explicit BlockImpl(const BlockOptions& options_) : options(options_) {
    reset();
  }

  void reset() override {
    const int64_t in = options.in_channels();
    const int64_t width = options.width();
    const int64_t out = options.out_channels();

    torch::nn::Sequential layers;
    if (options.preactivation()) {
      detail::push_activation(layers, in);
    }
    if (options.bottleneck()) {
      layers->push_back(detail::convolution(in, width, 1));
      detail::push_activation(layers, width);
      layers->push_back(detail::convolution(width, width, 3, options.stride()));
      detail::push_activation(layers, width);
      layers->push_back(detail::convolution(width, out, 1));
    } else {
      layers->push_back(detail::convolution(in, width, 3, options.stride()));
      detail::push_activation(layers, width);
      layers->push_back(detail::convolution(width, out, 3));
    }
    branch = register_module("branch", layers);

    shortcut = nullptr;
    if (options.changes_shape()) {
      shortcut = register_module(
          "shortcut",
          torch::nn::Sequential(
              detail::convolution(in, out, 1, options.stride()),
              torch::nn::BatchNorm2d(out)));
    }
  }

  torch::Tensor forward(torch::Tensor x) {
    auto y = branch->forward(x);
    return y.add_(shortcut ? shortcut->forward(x) : x);
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "resnet::Block(" << options.in_channels() << " -> "
           << options.out_channels() << ", stride=" << options.stride()
           << ", bottleneck=" << std::boolalpha << options.bottleneck() << ")";
  }

  BlockOptions options;
  torch::nn::Sequential branch{nullptr};
  torch::nn::Sequential shortcut{nullptr};
};

TORCH_MODULE(Block);

/// Classifies images with a chain of pre-activated residual blocks.
///
/// Shapes:   input (N, 3, H, W), H and W multiples of 4; output (N,
///           num_classes), logits.
/// Dtypes:   floating point.
/// Memory:   keeps every block's activations for backward: grows with depth.
/// Source:   He et al. 2016, "Identity Mappings in Deep Residual Networks",
///           arXiv:1603.05027.
/// Example:
///   resnet::ResNet net(resnet::named("resnet32").num_classes(100));
///   torch::Tensor logits = net(images);
class ResNetImpl final : public torch::nn::Cloneable<ResNetImpl> {
 public:
  explicit ResNetImpl(const ResNetOptions& options_ = {}) : options(options_) {
    reset();
  }

  void reset() override {
    TORCH_CHECK_VALUE(
        options.widths().size() == options.blocks().size(),
        "ResNet::reset(): expected as many entries in blocks as in widths, "
        "but got ",
        options.blocks().size(),
        " and ",
        options.widths().size(),
        ".");
    int64_t channels = options.stem();
    torch::nn::Sequential first(detail::convolution(3, channels, 3));
    detail::push_activation(first, channels);
    stem = register_module("stem", first);

    torch::nn::Sequential chain;
    for (size_t group = 0; group < options.widths().size(); ++group) {
      for (int64_t index = 0; index < options.blocks()[group]; ++index) {
        const auto block = BlockOptions(channels, options.widths()[group])
                               .stride(group > 0 && index == 0 ? 2 : 1)
                               .bottleneck(options.bottleneck())
                               .preactivation(group > 0 || index > 0);
        chain->push_back(Block(block));
        channels = block.out_channels();
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
    stream << "resnet::ResNet(num_classes=" << options.num_classes()
           << ", stem=" << options.stem()
           << ", widths=" << c10::IntArrayRef(options.widths())
           << ", blocks=" << c10::IntArrayRef(options.blocks())
           << ", bottleneck=" << std::boolalpha << options.bottleneck() << ")";
  }

  ResNetOptions options;
  torch::nn::Sequential stem{nullptr};
  torch::nn::Sequential trunk{nullptr};
  torch::nn::Sequential head{nullptr};
};

TORCH_MODULE(ResNet);

} // namespace resnet

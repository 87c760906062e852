// SPDX-License-Identifier: MIT
#pragma once

// Glow: a normalizing flow on images whose memory does not grow with its depth.
// This file alone is the model: copy it. It needs memcnn and LibTorch.

#include <memcnn/memcnn.h>
#include <torch/nn.h>
#include <torch/types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <ostream>
#include <utility>
#include <vector>

namespace glow {

// --- images and bits --------------------------------------------------------

/// What a flow learns from: bytes with uniform noise between one value and the
/// next, since a density of discrete values alone can grow without bound.
///
/// Shapes:   pixels (N, C, H, W), uint8; the same, float32, from -1/2 to 1/2.
/// Source:   Theis et al. 2016, A note on the evaluation of generative models,
///           arXiv:1511.01844, section 3.1.
inline torch::Tensor dequantise(
    const torch::Tensor& pixels,
    int64_t bits = 8, // that are kept of each byte
    const std::optional<at::Generator>& generator = std::nullopt) {
  const auto levels = static_cast<double>(1 << bits);
  const auto noise =
      torch::rand(pixels.sizes(), generator, torch::TensorOptions())
          .to(pixels.device());
  return pixels.div(1 << (8 - bits), "floor")
             .to(torch::kFloat32)
             .add_(noise)
             .div_(levels) -
      0.5;
}

/// The bytes that an input stands for: undoes dequantise().
inline torch::Tensor quantise(const torch::Tensor& input, int64_t bits = 8) {
  const int64_t levels = 1 << bits;
  return ((input + 0.5) * levels)
      .floor()
      .clamp(0, levels - 1)
      .mul(256 / levels)
      .to(torch::kUInt8);
}

/// Bits that a code by the model takes for each value of an image, of which
/// there are `values`: what flows are compared by.
///
/// \f[ \mathrm{bits} = -\frac{\log p(x)}{D \log 2} + \log_2 \mathrm{levels} \f]
///
/// Shapes:   log_prob (N), nats of dequantised images; the same.
inline torch::Tensor
bits_per_dim(const torch::Tensor& log_prob, int64_t values, int64_t bits = 8) {
  // One level is 1 / 2^bits wide: a density of x is that much larger.
  return log_prob / (-std::log(2.0) * static_cast<double>(values)) +
      static_cast<double>(bits);
}

// --- the model --------------------------------------------------------------

/// Sizes of a Glow; the defaults are the published ones for CIFAR-10.
struct GlowOptions {
  /// Height and width of images: divisible by 2 to the number of levels.
  TORCH_ARG(int64_t, image_size) = 32;
  /// Each halves height and width, and factors out half of the channels.
  TORCH_ARG(int64_t, levels) = 3;
  /// Of ActNorm, 1x1 convolution and coupling, in each level.
  TORCH_ARG(int64_t, steps) = 32;
  /// Channels inside of the couplings' branches.
  TORCH_ARG(int64_t, width) = 512;
  /// Of the 1x1 convolutions.
  TORCH_ARG(memcnn::Parametrization, parametrization) = memcnn::kLU;
  /// Steps from one kept stream to the next: what backward rebuilds drifts over
  /// so many at most. 0: over a level.
  TORCH_ARG(int64_t, anchor_every) = 8;
};

inline std::ostream& operator<<(
    std::ostream& stream,
    const GlowOptions& options) {
  return stream << "image_size=" << options.image_size()
                << ", levels=" << options.levels()
                << ", steps=" << options.steps()
                << ", width=" << options.width()
                << ", anchor_every=" << options.anchor_every();
}

/// What a coupling does with one half to say how the other changes: nothing at
/// first, so that a new flow keeps volumes nearly, whatever its depth.
inline torch::nn::Sequential branch(int64_t channels, int64_t width) {
  using torch::nn::Conv2d;
  using torch::nn::Conv2dOptions;
  const auto relu = [] {
    return torch::nn::ReLU(torch::nn::ReLUOptions().inplace(true));
  };
  Conv2d last(Conv2dOptions(width, 2 * channels, 3).padding(1));
  torch::nn::init::zeros_(last->weight);
  torch::nn::init::zeros_(last->bias);
  return torch::nn::Sequential(
      Conv2d(Conv2dOptions(channels, width, 3).padding(1)),
      relu(),
      Conv2d(Conv2dOptions(width, width, 1)),
      relu(),
      last);
}

/// A squeeze and the steps at one resolution: one node of autograd, which keeps
/// its output, and an anchor here and there.
inline memcnn::ReversibleSequence level(
    int64_t channels, // after the squeeze
    const GlowOptions& options) {
  constexpr int64_t kBlocksOfStep = 3;
  memcnn::ReversibleSequence blocks(
      memcnn::ReversibleSequenceOptions().anchor_every(
          kBlocksOfStep * options.anchor_every()));
  blocks->push_back(memcnn::Squeeze(2));
  for (int64_t step = 0; step < options.steps(); ++step) {
    blocks->push_back(memcnn::ActNorm(channels));
    blocks->push_back(memcnn::Conv1x1(
        channels,
        memcnn::Conv1x1Options().parametrization(options.parametrization())));
    blocks->push_back(memcnn::AffineCoupling(
        memcnn::AffineAdapterSigmoid(branch(channels / 2, options.width())),
        memcnn::Unchanged()));
  }
  return blocks;
}

/// The module behind Prior.
class PriorImpl final : public torch::nn::Cloneable<PriorImpl> {
 public:
  explicit PriorImpl(int64_t channels_) : channels(channels_) {
    reset();
  }

  void reset() override {
    mean = register_parameter("mean", torch::zeros({1, channels, 1, 1}));
    log_scale =
        register_parameter("log_scale", torch::zeros({1, channels, 1, 1}));
  }

  /// Of latents (N, C, H, W): (N), nats.
  torch::Tensor log_prob(const torch::Tensor& z) {
    const auto values = static_cast<double>(z.numel() / z.size(0));
    const torch::Tensor normal = (z - mean) * (-log_scale).exp();
    return normal.square().flatten(1).sum(1) * -0.5 -
        log_scale.sum() * (values / static_cast<double>(channels)) -
        0.5 * std::log(2 * M_PI) * values;
  }

  /// Latents out of standard normal ones.
  torch::Tensor latents(const torch::Tensor& normal) {
    return normal * log_scale.exp() + mean;
  }

  int64_t channels;
  torch::Tensor mean, log_scale;
};

/// Independent Gaussians, of one mean and scale for each channel of a latent.
TORCH_MODULE(Prior);

/// The module behind Glow.
class GlowImpl final : public torch::nn::Cloneable<GlowImpl> {
 public:
  explicit GlowImpl(const GlowOptions& options_) : options(options_) {
    const auto& o = options;
    const int64_t factor = o.levels() < 16 ? int64_t{1} << o.levels() : 0;
    TORCH_CHECK_VALUE(
        o.levels() >= 1 && o.steps() >= 1 && o.width() >= 1 &&
            o.anchor_every() >= 0,
        "Glow::Glow(): expected at least one level, step and channel, but got ",
        o,
        ". Give each at least 1.");
    TORCH_CHECK_VALUE(
        factor > 0 && o.image_size() >= factor && o.image_size() % factor == 0,
        "Glow::Glow(): expected an image_size divisible by 2 for each level, "
        "but got ",
        o,
        ". Give fewer levels.");
    reset();
  }

  void reset() override {
    flow = memcnn::MultiScale();
    priors.clear();
    int64_t channels = kColours;
    for (int64_t i = 0; i < options.levels(); ++i) {
      channels *= 4;
      flow->push_back(level(channels, options));
      channels /= i + 1 < options.levels() ? 2 : 1;
      priors.push_back(
          register_module("prior" + std::to_string(i), Prior(channels)));
    }
    register_module("flow", flow);
  }

  /// Of dequantised images (N, 3, S, S): (N), nats.
  torch::Tensor log_prob(const torch::Tensor& images) {
    auto [z, log_prob] = flow->forward_with_log_det(images);
    for (size_t i = 0; i < z.size(); ++i) {
      log_prob = log_prob + priors[i]->log_prob(z[i]);
    }
    return log_prob;
  }

  /// New images: the temperature scales the deviation of latents, below 1 for
  /// fewer odd ones. Draws from the generator of the CPU, or the given one.
  torch::Tensor sample(
      int64_t count,
      double temperature,
      const std::optional<at::Generator>& generator = std::nullopt) {
    const torch::NoGradGuard no_grad;
    std::vector<torch::Tensor> z;
    int64_t size = options.image_size();
    for (Prior& prior : priors) {
      size /= 2;
      const auto normal = torch::randn(
          {count, prior->channels, size, size},
          generator,
          torch::TensorOptions());
      z.push_back(
          prior->latents(normal.to(prior->mean.device()) * temperature));
    }
    return flow->inverse(z);
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "glow::Glow(" << options << ")";
  }

  static constexpr int64_t kColours = 3;

  GlowOptions options;
  memcnn::MultiScale flow{nullptr};
  std::vector<Prior> priors; // of each level's latents
};

/// A Glow of one-sided affine couplings.
///
/// Memory:   less than two images a sample and the anchors, whatever the number
///           of steps; parameters grow with it.
/// Source:   Kingma and Dhariwal 2018, Glow: Generative Flow with Invertible 1x1
///           Convolutions, arXiv:1807.03039. Differs: no ActNorm inside of
///           branches, and latents that are factored out have a learned mean and
///           scale a channel, not ones that depend on the rest.
/// Example:
///   glow::Glow model(glow::GlowOptions().steps(8).width(64));
///   memcnn::initialize(model->flow, glow::dequantise(first_pixels));
///   auto log_prob = model->log_prob(glow::dequantise(pixels));
///   glow::bits_per_dim(log_prob, pixels[0].numel()).mean().backward();
///   auto images = glow::quantise(model->sample(64, /*temperature=*/0.7));
TORCH_MODULE(Glow);

// --- how exactly it is undone -----------------------------------------------

/// How far a flow that goes there and back is off.
struct RoundTrip {
  double error = 0; // largest of a value of an image, whose range is 1
  std::vector<double> drift; // of each level by itself, relative in norm
};

/// Sends images through the flow and back. Waits for the device.
inline RoundTrip round_trip(Glow& model, const torch::Tensor& images) {
  const torch::NoGradGuard no_grad;
  auto& flow = model->flow;
  RoundTrip found;
  const torch::Tensor again = flow->inverse(flow->forward(images));
  found.error = (again - images).abs().max().item<double>();
  torch::Tensor stream = images;
  for (size_t i = 0; i < flow->size(); ++i) {
    auto level = flow->level(i);
    const torch::Tensor output = level->forward(stream);
    const torch::Tensor rebuilt = level->inverse(output);
    found.drift.push_back(
        ((rebuilt - stream).norm() / stream.norm()).item<double>());
    stream = output.chunk(2, /*dim=*/1)[0]; // as MultiScale goes on
  }
  return found;
}

} // namespace glow

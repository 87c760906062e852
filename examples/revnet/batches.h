// SPDX-License-Identifier: MIT
#pragma once

#include "error.h"
#include "images.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cmath>
#include <cstdint>
#include <string>

namespace training {

/// Images as a network takes them.
struct Batch {
  torch::Tensor images; // (N, 3, 32, 32), float32, normalised
  torch::Tensor labels; // (N), int64
};

/// Brings pixels to mean 0 and variance 1 per channel, by the statistics of the
/// training images: test images must not leak into training.
class Normalisation {
 public:
  explicit Normalisation(const torch::Tensor& train_pixels)
      : mean_(torch::empty({1, 3, 1, 1})), deviation_(mean_.clone()) {
    const auto values = torch::arange(256, torch::kFloat64);
    for (int64_t channel = 0; channel < 3; ++channel) {
      // Pixels take 256 values: a histogram holds all there is to know.
      const auto counts =
          torch::bincount(
              train_pixels.select(1, channel).flatten(), {}, /*minlength=*/256)
              .to(torch::kCPU, torch::kFloat64);
      const auto shares = counts / counts.sum();
      const double mean = (shares * values).sum().item<double>();
      const double square = (shares * values * values).sum().item<double>();
      mean_.select(1, channel).fill_(mean);
      deviation_.select(1, channel).fill_(std::sqrt(square - mean * mean));
    }
    mean_ = mean_.to(train_pixels.device());
    deviation_ = deviation_.to(train_pixels.device());
  }

  torch::Tensor operator()(const torch::Tensor& pixels) const {
    return pixels.to(torch::kFloat32).sub_(mean_).div_(deviation_);
  }

 private:
  torch::Tensor mean_; // (1, 3, 1, 1)
  torch::Tensor deviation_; // (1, 3, 1, 1)
};

namespace detail {

/// A generator for one purpose and one moment of a run. Batches depend on the
/// seed and the iteration alone, so a resumed run needs no generator's state,
/// and what a network draws does not change its data.
inline at::Generator
generator_for(uint64_t seed, uint64_t purpose, int64_t moment) {
  const uint64_t mixed = seed * 0x9e3779b97f4a7c15u +
      purpose * 0xbf58476d1ce4e5b9u +
      static_cast<uint64_t>(moment) * 0x94d049bb133111ebu;
  return at::detail::createCPUGenerator(mixed ^ (mixed >> 31));
}

} // namespace detail

/// Pads each image by 4 pixels, cuts a random 32 x 32 window out of it and
/// flips every other one: the usual augmentation of CIFAR.
///
/// Shapes:   input, output (N, 3, 32, 32).
/// Source:   He et al. 2016, arXiv:1512.03385, section 4.2.
inline torch::Tensor crop_and_flip(
    const torch::Tensor& images,
    at::Generator generator) {
  constexpr int64_t kPadding = 4;
  const int64_t count = images.size(0);
  const auto device = images.device();
  const auto offsets = torch::randint(
      2 * kPadding + 1, {2, count, 1}, generator, torch::kInt64); // y, x
  const auto flips = torch::randint(2, {count, 1}, generator, torch::kBool);

  const auto positions = torch::arange(kImageSize).unsqueeze(0); // (1, 32)
  const auto rows = offsets[0] + positions; // (N, 32)
  const auto columns = offsets[1] +
      torch::where(flips, kImageSize - 1 - positions, positions); // (N, 32)

  using torch::indexing::Slice;
  const auto padded = torch::constant_pad_nd(
      images, {kPadding, kPadding, kPadding, kPadding}); // (N, 3, 40, 40)
  const auto picked = padded.index(
      {torch::arange(count, torch::TensorOptions(device)).view({count, 1, 1}),
       Slice(),
       rows.unsqueeze(2).to(device),
       columns.unsqueeze(1).to(device)}); // (N, 32, 32, 3)
  return picked.permute({0, 3, 1, 2}).contiguous();
}

/// Training batches by iteration: each pass over the images in a new order, and
/// every image augmented anew.
class TrainingBatches {
 public:
  TrainingBatches(
      const Images& images,
      const Normalisation& normalise,
      int64_t batch_size,
      uint64_t seed)
      : images_(images),
        normalise_(normalise),
        batch_size_(batch_size),
        batches_per_pass_(images.size() / batch_size),
        seed_(seed) {
    if (batches_per_pass_ == 0) {
      throw Error(
          "expected --batch-size to be at most the " +
          std::to_string(images.size()) + " training images, but got " +
          std::to_string(batch_size) + ".");
    }
  }

  Batch at(int64_t iteration) {
    const int64_t pass = iteration / batches_per_pass_;
    if (pass != pass_) {
      order_ = torch::randperm(
                   images_.size(),
                   detail::generator_for(seed_, kOrder, pass),
                   torch::kInt64)
                   .to(images_.labels.device());
      pass_ = pass;
    }
    const auto picks = order_.narrow(
        0, (iteration % batches_per_pass_) * batch_size_, batch_size_);
    return {
        crop_and_flip(
            normalise_(images_.pixels.index_select(0, picks)),
            detail::generator_for(seed_, kAugmentation, iteration)),
        images_.labels.index_select(0, picks)};
  }

 private:
  static constexpr uint64_t kOrder = 1;
  static constexpr uint64_t kAugmentation = 2;

  Images images_;
  Normalisation normalise_;
  int64_t batch_size_;
  int64_t batches_per_pass_;
  uint64_t seed_;
  int64_t pass_ = -1;
  torch::Tensor order_; // of the images in pass_
};

/// The images from `first` on, at most `count`, as they are: for evaluation.
inline Batch test_batch(
    const Images& images,
    const Normalisation& normalise,
    int64_t first,
    int64_t count) {
  count = std::min(count, images.size() - first);
  return {
      normalise(images.pixels.narrow(0, first, count)),
      images.labels.narrow(0, first, count)};
}

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/data/images.h"
#include "train/data/normalisation.h"
#include "train/data/window.h"

#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace training {

/// Images as a network takes them.
struct Batch {
  torch::Tensor images; // (N, 3, 32, 32), float32, normalised
  torch::Tensor labels; // (N), int64
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

inline Batch empty_batch(int64_t count, bool pinned) {
  const auto options = torch::TensorOptions().pinned_memory(pinned);
  return {
      torch::empty(
          {count, 3, kImageSize, kImageSize}, options.dtype(torch::kFloat32)),
      torch::empty({count}, options.dtype(torch::kInt64))};
}

inline void fill_place(
    const Images& images,
    int64_t source,
    const Window& window,
    const Normalisation& normalise,
    int64_t place,
    Batch& batch) {
  copy_window(
      images.pixels.const_data_ptr<uint8_t>() + source * kImageBytes,
      window,
      normalise,
      batch.images.data_ptr<float>() + place * kImageBytes);
  batch.labels.data_ptr<int64_t>()[place] =
      images.labels.const_data_ptr<int64_t>()[source];
}

} // namespace detail

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
      throw support::Error(fmt::format(
          "expected --batch-size to be at most the {} training images, but "
          "got {}.",
          images.size(),
          batch_size));
    }
  }

  /// Memory for a batch; `pinned`, so that a GPU can fetch it by itself.
  Batch empty_batch(bool pinned = false) const {
    return detail::empty_batch(batch_size_, pinned);
  }

  /// Fills a batch of this size, without a parallel loop of LibTorch's: that
  /// would take the cores from the step.
  void fill(int64_t iteration, Batch& batch) {
    const int64_t pass = iteration / batches_per_pass_;
    if (pass != pass_) {
      const auto order = torch::randperm(
          images_.size(),
          detail::generator_for(seed_, kOrder, pass),
          torch::kInt64);
      const auto* first = order.const_data_ptr<int64_t>();
      order_.assign(first, first + order.numel());
      pass_ = pass;
    }
    const auto windows = draw_windows(
        batch_size_, detail::generator_for(seed_, kAugmentation, iteration));
    const int64_t first = (iteration % batches_per_pass_) * batch_size_;
    for (int64_t place = 0; place < batch_size_; ++place) {
      detail::fill_place(
          images_,
          order_[static_cast<size_t>(first + place)],
          windows[static_cast<size_t>(place)],
          normalise_,
          place,
          batch);
    }
  }

  Batch at(int64_t iteration) {
    Batch batch = empty_batch();
    fill(iteration, batch);
    return batch;
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
  std::vector<int64_t> order_; // of the images in pass_
};

/// The images from `first` on, at most `count`, as they are: for evaluation.
inline Batch test_batch(
    const Images& images,
    const Normalisation& normalise,
    int64_t first,
    int64_t count) {
  count = std::min(count, images.size() - first);
  Batch batch = detail::empty_batch(count, /*pinned=*/false);
  for (int64_t place = 0; place < count; ++place) {
    detail::fill_place(
        images, first + place, Window(), normalise, place, batch);
  }
  return batch;
}

} // namespace training

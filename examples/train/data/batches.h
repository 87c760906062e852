// SPDX-License-Identifier: MIT
#pragma once

#include "train/data/crops.h"
#include "train/data/images.h"
#include "train/data/normalisation.h"
#include "train/data/slice.h"
#include "train/data/window.h"

#include <torch/types.h>

#include <cstdint>

namespace training {

/// Images as a network takes them.
struct Batch {
  torch::Tensor images; // (N, 3, 32, 32), float32, normalised
  torch::Tensor labels; // (N), int64
};

/// Training batches by iteration, or slices of them, on the CPU.
class TrainingBatches {
 public:
  TrainingBatches(
      const Images& images,
      const Normalisation& normalise,
      int64_t batch_size,
      uint64_t seed,
      Slice slice = {})
      : images_(images),
        normalise_(normalise),
        crops_(images.size(), batch_size, seed, slice) {}

  /// Memory for a batch.
  Batch empty_batch() const {
    const int64_t size = crops_.size();
    return {
        torch::empty({size, 3, kImageSize, kImageSize}, torch::kFloat32),
        torch::empty({size}, torch::kInt64)};
  }

  /// Fills a batch of this size, without a parallel loop of LibTorch's: that
  /// would take the cores from the step.
  void fill(int64_t iteration, Batch& batch) {
    const auto* pixels = images_.pixels.const_data_ptr<uint8_t>();
    const auto* labels = images_.labels.const_data_ptr<int64_t>();
    auto* image = batch.images.data_ptr<float>();
    auto* label = batch.labels.data_ptr<int64_t>();
    for (const Crop& crop : crops_.at(iteration)) {
      copy_window(
          pixels + crop.image * kImageBytes, crop.window, normalise_, image);
      image += kImageBytes;
      *label++ = labels[crop.image];
    }
  }

  Batch at(int64_t iteration) {
    Batch batch = empty_batch();
    fill(iteration, batch);
    return batch;
  }

 private:
  Images images_;
  Normalisation normalise_;
  TrainingCrops crops_;
};

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/data/slice.h"
#include "train/data/window.h"

#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>
#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace training {

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

/// What a place of a batch is cut out of, and how.
struct Crop {
  int64_t image; // by its place in the data set
  Window window;
};

/// The crops of training batches by iteration: each pass over the images in a
/// new order, and every image augmented anew. All of a batch but its bytes.
///
/// A slice has the crops that the whole batch has there.
class TrainingCrops final {
 public:
  /// Of a data set of so many images.
  TrainingCrops(
      int64_t images,
      int64_t batch_size,
      uint64_t seed,
      Slice slice = {})
      : images_(images),
        batch_size_(batch_size),
        slice_(slice),
        batches_per_pass_(images / batch_size),
        seed_(seed) {
    if (batches_per_pass_ == 0) {
      throw support::Error(fmt::format(
          "expected --batch-size to be at most the {} training images, but "
          "got {}.",
          images,
          batch_size));
    }
  }

  /// Of a batch, how many are in the slice.
  int64_t size() const {
    return slice_.size(batch_size_);
  }

  std::vector<Crop> at(int64_t iteration) {
    const int64_t pass = iteration / batches_per_pass_;
    if (pass != pass_) {
      const auto order = torch::randperm(
          images_, generator_for(seed_, kOrder, pass), torch::kInt64);
      const auto* first = order.const_data_ptr<int64_t>();
      order_.assign(first, first + order.numel());
      pass_ = pass;
    }
    const auto windows = draw_windows(
        batch_size_, generator_for(seed_, kAugmentation, iteration));
    const int64_t first = (iteration % batches_per_pass_) * batch_size_;
    const int64_t begin = slice_.first(batch_size_);
    std::vector<Crop> crops;
    for (int64_t place = begin; place < begin + size(); ++place) {
      crops.push_back(
          {order_[static_cast<size_t>(first + place)],
           windows[static_cast<size_t>(place)]});
    }
    return crops;
  }

 private:
  static constexpr uint64_t kOrder = 1;
  static constexpr uint64_t kAugmentation = 2;

  int64_t images_;
  int64_t batch_size_;
  Slice slice_;
  int64_t batches_per_pass_;
  uint64_t seed_;
  int64_t pass_ = -1;
  std::vector<int64_t> order_; // of the images in pass_
};

} // namespace training

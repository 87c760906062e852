// SPDX-License-Identifier: MIT
#pragma once

#include "train/data/batches.h"
#include "train/data/crops.h"
#include "train/data/device_images.h"

#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace training {

/// The training batches of a device that holds the images itself. The host draws
/// crops for some iterations and sends them in one copy; the device counts which
/// of them is next, so that a graph that makes a batch makes another each time.
class DeviceBatches final {
 public:
  DeviceBatches(DeviceImages images, TrainingCrops crops, torch::Device device)
      : images_(std::move(images)),
        crops_(std::move(crops)),
        sent_(torch::zeros(
            {kAhead, 4, crops_.size()},
            torch::TensorOptions(device).dtype(torch::kInt64))),
        next_(torch::zeros({1}, sent_.options())),
        one_(torch::ones({1}, sent_.options())) {}

  /// Lets next() be the batch of this iteration. For the one after the last
  /// that was made next this costs nothing but each kAhead-th time.
  void make_next(int64_t iteration) {
    if (iteration != first_ + done_ || done_ == kAhead) {
      send(iteration);
    }
    ++done_;
  }

  /// The batch of the iteration that make_next() was given, made on the device.
  Batch next() {
    const auto crops = sent_.index_select(0, next_).squeeze(0); // (4, N)
    next_.add_(one_);
    return images_.cropped(crops);
  }

  /// The batch of any iteration. What is next stays next.
  Batch at(int64_t iteration) {
    const auto crops = torch::empty({4, crops_.size()}, torch::kInt64);
    write(iteration, crops);
    return images_.cropped(crops.to(sent_.device()));
  }

 private:
  static constexpr int64_t kAhead = 32; // 100 kB of batches of 100

  /// Sends crops of this iteration and those after it.
  void send(int64_t iteration) {
    // From pinned memory a copy does not wait; LibTorch keeps that memory until
    // the copy is done.
    const auto crops = torch::empty(
        sent_.sizes(),
        torch::TensorOptions(torch::kInt64)
            .pinned_memory(sent_.device().is_cuda()));
    for (int64_t index = 0; index < kAhead; ++index) {
      write(iteration + index, crops[index]);
    }
    sent_.copy_(crops, /*non_blocking=*/true);
    next_.zero_();
    first_ = iteration;
    done_ = 0;
  }

  /// Fills (4, N) numbers as DeviceImages::cropped() takes them.
  void write(int64_t iteration, const torch::Tensor& numbers) {
    auto* number = numbers.data_ptr<int64_t>();
    const int64_t size = crops_.size();
    for (const auto& [image, window] : crops_.at(iteration)) {
      number[0] = image;
      number[size] = window.top;
      number[2 * size] = window.left;
      number[3 * size] = window.flip ? 1 : 0;
      ++number;
    }
  }

  DeviceImages images_;
  TrainingCrops crops_;
  torch::Tensor sent_; // (kAhead, 4, N), int64
  torch::Tensor next_; // (1), int64: which of them is next
  torch::Tensor one_;
  int64_t first_ = -1; // iteration of the first that were sent
  int64_t done_ = kAhead; // how many of them were made next
};

} // namespace training

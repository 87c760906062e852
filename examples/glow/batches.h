// SPDX-License-Identifier: MIT
#pragma once

#include "glow/config.h"
#include "glow/glow.h"
#include "train/data/crops.h"
#include "train/data/images.h"

#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace glow {

/// What random numbers are drawn for, beside those of training::TrainingCrops:
/// each by seed and moment alone, so that a run that goes on draws the same.
enum class Purpose : uint64_t { kNoise = 11, kTestNoise = 12, kSamples = 13 };

inline at::Generator
generator_for(const Config& config, Purpose purpose, int64_t moment) {
  return training::generator_for(
      config.seed, static_cast<uint64_t>(purpose), moment);
}

/// Dequantised batches on a device, which holds all bytes.
class Batches final {
 public:
  Batches(
      const Config& config,
      const training::DataSet& data,
      torch::Device device)
      : config_(config),
        train_(data.train.pixels.to(device)),
        test_(data.test.pixels.to(device)),
        crops_(data.train.size(), config.batch_size, config.seed) {}

  /// The training batch of an iteration; every other image is mirrored.
  torch::Tensor at(int64_t iteration) {
    std::vector<int64_t> images;
    std::vector<uint8_t> flips;
    for (const training::Crop& crop : crops_.at(iteration)) {
      images.push_back(crop.image);
      flips.push_back(crop.window.flip ? 1 : 0);
    }
    const torch::Device device = train_.device();
    const torch::Tensor pixels =
        train_.index_select(0, torch::tensor(images).to(device));
    const torch::Tensor is_flipped =
        torch::tensor(flips, torch::kBool).view({-1, 1, 1, 1}).to(device);
    return dequantised(
        torch::where(is_flipped, pixels.flip(3), pixels),
        Purpose::kNoise,
        iteration);
  }

  /// Test images from that one on, as they are, with the same noise each time.
  torch::Tensor test(int64_t first, int64_t most) const {
    const int64_t count = std::min(most, test_images() - first);
    return dequantised(
        test_.narrow(0, first, count), Purpose::kTestNoise, first);
  }

  int64_t test_images() const {
    return test_.size(0);
  }

 private:
  torch::Tensor dequantised(
      const torch::Tensor& pixels,
      Purpose purpose,
      int64_t moment) const {
    return dequantise(
        pixels, config_.learn_bits, generator_for(config_, purpose, moment));
  }

  Config config_;
  torch::Tensor train_; // (N, 3, 32, 32), uint8
  torch::Tensor test_;
  training::TrainingCrops crops_;
};

} // namespace glow

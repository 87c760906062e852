// SPDX-License-Identifier: MIT
#pragma once

#include <torch/types.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace training {

/// Brings pixels to mean 0 and variance 1 per channel, by the statistics of the
/// training images: test images must not leak into training.
class Normalisation {
 public:
  static constexpr int64_t kLevels = 256; // of a pixel
  static constexpr int64_t kPadding = 3 * kLevels; // its place in table()

  explicit Normalisation(const torch::Tensor& train_pixels) {
    const auto grey = torch::arange(kLevels, torch::kFloat64);
    for (int64_t channel = 0; channel < 3; ++channel) {
      // Pixels take 256 values: a histogram holds all there is to know.
      const auto counts = torch::bincount(
                              train_pixels.select(1, channel).flatten(),
                              {},
                              /*minlength=*/kLevels)
                              .to(torch::kFloat64);
      const auto shares = counts / counts.sum();
      const double mean = (shares * grey).sum().item<double>();
      const double square = (shares * grey * grey).sum().item<double>();
      const auto values = torch::arange(kLevels, torch::kFloat32)
                              .sub_(mean)
                              .div_(std::sqrt(square - mean * mean));
      std::copy_n(
          values.const_data_ptr<float>(),
          kLevels,
          values_.begin() + kLevels * channel);
    }
  }

  /// What a pixel of a channel becomes.
  float operator()(int64_t channel, uint8_t pixel) const {
    return values_[static_cast<size_t>(kLevels * channel + pixel)];
  }

  /// What every pixel of every channel becomes, and last what is beyond the
  /// edge: 0, the mean.
  torch::Tensor table(torch::Device device) const {
    auto values = torch::zeros({kPadding + 1}, torch::kFloat32);
    std::copy(values_.begin(), values_.end(), values.data_ptr<float>());
    return values.to(device);
  }

 private:
  // By channel and pixel: all there are.
  std::array<float, 3 * kLevels> values_{};
};

} // namespace training

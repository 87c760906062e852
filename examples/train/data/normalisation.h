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
  explicit Normalisation(const torch::Tensor& train_pixels) {
    const auto grey = torch::arange(256, torch::kFloat64);
    for (int64_t channel = 0; channel < 3; ++channel) {
      // Pixels take 256 values: a histogram holds all there is to know.
      const auto counts =
          torch::bincount(
              train_pixels.select(1, channel).flatten(), {}, /*minlength=*/256)
              .to(torch::kFloat64);
      const auto shares = counts / counts.sum();
      const double mean = (shares * grey).sum().item<double>();
      const double square = (shares * grey * grey).sum().item<double>();
      const auto values = torch::arange(256, torch::kFloat32)
                              .sub_(mean)
                              .div_(std::sqrt(square - mean * mean));
      std::copy_n(
          values.const_data_ptr<float>(), 256, values_.begin() + 256 * channel);
    }
  }

  /// What a pixel of a channel becomes.
  float operator()(int64_t channel, uint8_t pixel) const {
    return values_[static_cast<size_t>(256 * channel + pixel)];
  }

 private:
  std::array<float, 3 * 256> values_{}; // by channel and pixel: all there are
};

} // namespace training

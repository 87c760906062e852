// SPDX-License-Identifier: MIT
#pragma once

#include "train/data/images.h"
#include "train/data/normalisation.h"

#include <ATen/core/Generator.h>
#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace training {

/// A window of an image: what is cut out of it, and whether mirrored. Beyond the
/// edge of the image lies padding.
struct Window {
  int64_t top = 0; // may be negative
  int64_t left = 0; // likewise
  bool flip = false;
};

/// Moves the window by up to 4 pixels each way and flips every other one: the
/// usual augmentation of CIFAR.
///
/// Source:   He et al. 2016, arXiv:1512.03385, section 4.2.
inline std::vector<Window> draw_windows(
    int64_t count,
    at::Generator generator) {
  constexpr int64_t kPadding = 4;
  const auto offsets = torch::randint(
      2 * kPadding + 1, {2, count}, generator, torch::kInt64); // y, x
  const auto flips = torch::randint(2, {count}, generator, torch::kInt64);
  const auto* drawn = offsets.const_data_ptr<int64_t>();
  const auto* flip = flips.const_data_ptr<int64_t>();
  std::vector<Window> windows;
  for (int64_t index = 0; index < count; ++index) {
    windows.push_back(
        {drawn[index] - kPadding,
         drawn[count + index] - kPadding,
         flip[index] != 0});
  }
  return windows;
}

/// Cuts a window out of an image of 3 x 32 x 32 pixels and normalises it, in
/// one pass. Padding becomes 0, the mean.
inline void copy_window(
    const uint8_t* pixels,
    const Window& window,
    const Normalisation& normalise,
    float* out) {
  const auto inside = [](int64_t position) {
    return position >= 0 && position < kImageSize;
  };
  for (int64_t channel = 0; channel < 3; ++channel) {
    for (int64_t y = 0; y < kImageSize; ++y) {
      const int64_t row = y + window.top;
      const uint8_t* line = pixels + (channel * kImageSize + row) * kImageSize;
      for (int64_t x = 0; x < kImageSize; ++x) {
        const int64_t column =
            (window.flip ? kImageSize - 1 - x : x) + window.left;
        *out++ = inside(row) && inside(column)
            ? normalise(channel, line[column])
            : 0.0F;
      }
    }
  }
}

} // namespace training

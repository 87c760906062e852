// SPDX-License-Identifier: MIT
#pragma once

#include "train/data/images.h"

#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

namespace training {

/// Sizes of the embedded data set.
struct SyntheticSizes {
  int64_t train = 10000; // enough that 200 batches of 50 show each image once
  int64_t test = 2000; // accuracy to about 1 %
  uint64_t seed = 1; // the data set is part of the task: same for every run
};

namespace detail {

/// Random numbers that are the same on every platform (the distributions of
/// <random> are not).
///
/// Source:   Steele et al. 2014, "Fast Splittable Pseudorandom Number
///           Generators" (SplitMix64).
class SplitMix {
 public:
  explicit SplitMix(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  /// Uniform in [low, high).
  double uniform(double low, double high) {
    constexpr double kUnit = 1.0 / 9007199254740992.0; // 2^-53
    return low + (high - low) * static_cast<double>(next() >> 11) * kUnit;
  }

 private:
  uint64_t state_;
};

/// Whether class `shape` covers the point (x, y) of its own square [-1, 1]^2.
/// Every shape is its own mirror image, since training flips images.
inline bool covers(int64_t shape, double x, double y) {
  const double ax = std::abs(x);
  const double ay = std::abs(y);
  if (ax > 1 || ay > 1) {
    return false;
  }
  const double radius = x * x + y * y;
  const auto odd = [](double t) {
    return static_cast<int64_t>(std::floor(t * 2.5 + 2.5)) % 2 != 0;
  };
  switch (shape) {
    case 0: // disc
      return radius <= 1;
    case 1: // ring
      return radius <= 1 && radius >= 0.35;
    case 2: // square
      return true;
    case 3: // frame
      return std::max(ax, ay) >= 0.6;
    case 4: // triangle on its base
      return 2 * ax <= 1 + y;
    case 5: // triangle on its tip
      return 2 * ax <= 1 - y;
    case 6: // upright cross
      return std::min(ax, ay) <= 0.3;
    case 7: // diagonal cross
      return std::abs(ax - ay) <= 0.4;
    case 8: // horizontal bars
      return !odd(y);
    default: // vertical bars
      return !odd(x);
  }
}

/// Draws one image: a shape of any colour, place and size on a background of
/// any colour and slope, with a blot or two over it and noise on every pixel.
inline void draw(int64_t shape, SplitMix& random, uint8_t* pixels) {
  struct Blot {
    double x, y, size, value;
  };
  constexpr double kSize = static_cast<double>(kImageSize);
  // Brighter or darker than the background with equal odds: no weighted sum of
  // the pixels tells one class from another.
  const double side = random.next() % 2 == 0 ? 1 : -1;
  const double half = random.uniform(7, 13);
  const double centre_x = random.uniform(half, kSize - half);
  const double centre_y = random.uniform(half, kSize - half);
  std::array<Blot, 2> blots;
  for (auto& blot : blots) {
    blot = {
        random.uniform(0, kSize),
        random.uniform(0, kSize),
        random.uniform(1, 3),
        0};
  }

  for (int64_t channel = 0; channel < 3; ++channel) {
    const double background = random.uniform(80, 176);
    const double colour = background + side * random.uniform(30, 80);
    const double slope_x = random.uniform(-1, 1);
    const double slope_y = random.uniform(-1, 1);
    for (auto& blot : blots) {
      blot.value = random.uniform(0, 256);
    }
    for (int64_t row = 0; row < kImageSize; ++row) {
      for (int64_t column = 0; column < kImageSize; ++column) {
        const double x = static_cast<double>(column) + 0.5;
        const double y = static_cast<double>(row) + 0.5;
        const bool inside =
            covers(shape, (x - centre_x) / half, (y - centre_y) / half);
        double value = inside ? colour : background;
        value += slope_x * (x - kSize / 2) + slope_y * (y - kSize / 2);
        for (const auto& blot : blots) {
          if (std::abs(x - blot.x) <= blot.size &&
              std::abs(y - blot.y) <= blot.size) {
            value = blot.value;
          }
        }
        // A sum of three is close enough to a normal distribution.
        value += random.uniform(-12, 12) + random.uniform(-12, 12) +
            random.uniform(-12, 12);
        *pixels++ = static_cast<uint8_t>(std::clamp(value, 0.0, 255.0));
      }
    }
  }
}

inline Images draw_images(int64_t count, uint64_t seed) {
  Images images{
      torch::empty({count, 3, kImageSize, kImageSize}, torch::kUInt8),
      torch::empty({count}, torch::kInt64)};
  auto* pixels = images.pixels.data_ptr<uint8_t>();
  auto* labels = images.labels.data_ptr<int64_t>();
  SplitMix random(seed);
  for (int64_t index = 0; index < count; ++index) {
    labels[index] = index % 10;
    draw(labels[index], random, pixels + index * kImageBytes);
  }
  return images;
}

} // namespace detail

/// Makes the embedded data set: ten shapes in images like CIFAR's.
///
/// A network has to learn shape, since colour, brightness, place and size say
/// nothing about the class. All classes have equally many images.
///
/// Memory:   3072 bytes per image, 35 MiB by default.
inline DataSet make_synthetic(const SyntheticSizes& sizes = {}) {
  return {
      detail::draw_images(sizes.train, sizes.seed),
      detail::draw_images(sizes.test, ~sizes.seed),
      10};
}

} // namespace training

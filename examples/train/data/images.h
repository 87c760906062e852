// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/checksum.h"

#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace training {

inline constexpr int64_t kImageSize = 32; // pixels, both ways
inline constexpr int64_t kImageBytes = 3 * kImageSize * kImageSize;

/// Labelled images as they are stored.
struct Images {
  torch::Tensor pixels; // (N, 3, 32, 32), uint8
  torch::Tensor labels; // (N), int64

  int64_t size() const {
    return labels.size(0);
  }
};

/// Leaves the first of the images only; all of them where `count` is 0.
inline void keep_first(Images& images, int64_t count) {
  if (count > 0 && count < images.size()) {
    images.pixels = images.pixels.narrow(0, 0, count);
    images.labels = images.labels.narrow(0, 0, count);
  }
}

struct DataSet {
  Images train;
  Images test;
  int64_t num_classes = 0;
  std::vector<std::string> class_names = {}; // by number; may be unknown
  std::string class_names_flaw = ""; // why, where a file has them
};

/// Tells one data set from another, or from the same with a byte changed.
inline uint32_t fingerprint(const DataSet& data) {
  uint32_t sum = 0;
  for (const Images* images : {&data.train, &data.test}) {
    for (const torch::Tensor& tensor : {images->pixels, images->labels}) {
      const auto* bytes = static_cast<const char*>(tensor.const_data_ptr());
      sum = checksum({bytes, tensor.nbytes()}, sum);
    }
  }
  return sum;
}

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include "train/data/checksum.h"

#include <torch/types.h>

#include <cstdint>
#include <string>

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

struct DataSet {
  Images train;
  Images test;
  int64_t num_classes = 0;
};

/// Tells one data set from another, or from the same with a byte changed.
inline std::string fingerprint(const DataSet& data) {
  Checksum sum;
  for (const Images* images : {&data.train, &data.test}) {
    for (const torch::Tensor& tensor : {images->pixels, images->labels}) {
      sum.add(tensor.const_data_ptr(), tensor.nbytes());
    }
  }
  return sum.text();
}

} // namespace training

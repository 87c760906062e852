// SPDX-License-Identifier: MIT
#pragma once

#include "layers.h"
#include "situations.h"

#include <algorithm>
#include <string>
#include <vector>

namespace memcnn_test {

/// A layer that LibTorch itself refuses to run in a situation, in some versions
/// at least.
struct Refusal {
  std::string situation;
  std::vector<std::string> layers;
  std::string reason;
};

inline std::vector<Refusal> refusals() {
  return {
      {"BFloat16",
       {"AvgPool3d", "LPPool3d", "LocalResponseNorm"},
       "avg_pool3d has no such kernel on the CPU"},
      {"BatchOne",
       {"BatchNorm1dOfFeatures"},
       "one value for each channel has no variance"},
      {"TransposedBatchOne",
       {"BatchNorm1dOfFeatures"},
       "one value for each channel has no variance"},
      {"BatchZero",
       {"InstanceNorm1dTracking",
        "InstanceNorm2dTracking",
        "InstanceNorm3dTracking"},
       "it selects the first image's statistics"},
      {"BatchZero", {"LSTMBatchFirst"}, "no sequence"},
      {"BatchZero",
       {"LocalResponseNorm",
        "MultiheadAttention",
        "TransformerEncoderLayer",
        "TransformerEncoder",
        "TransformerDecoderLayer",
        "TransformerDecoder",
        "Transformer"},
       "a size of -1 is not known where there are no entries"},
      {"BatchZero",
       {"PixelShuffle", "PixelUnshuffle"},
       "without entries they leave the sizes alone"},
  };
}

/// Whether LibTorch may refuse, so that an error is what plain autograd gives.
inline bool may_be_refused(const Layer& layer, const Situation& situation) {
  const std::vector<Refusal> all = refusals();
  return std::any_of(all.begin(), all.end(), [&](const Refusal& refusal) {
    const auto& layers = refusal.layers;
    return refusal.situation == situation.name &&
        std::find(layers.begin(), layers.end(), layer.name) != layers.end();
  });
}

} // namespace memcnn_test

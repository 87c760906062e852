// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/kept_activations.h>
#include <memcnn/sequence.h>

#include "revnet/revnet.h"

#include <torch/nn.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace training {

/// Bytes that results of the convolutions in each group's reversible blocks take,
/// and statistics of the normalisations before them, in batches of so many images
/// of 32 x 32 and numbers of so many bytes.
inline std::vector<int64_t> result_bytes(
    const revnet::RevNetOptions& options,
    int64_t batch_size,
    int64_t number_bytes) {
  constexpr int64_t kStatistics = 2 * 4; // bytes of a channel
  std::vector<int64_t> bytes;
  int64_t positions = batch_size * 32 * 32;
  int64_t channels = options.stem();
  for (size_t group = 0; group < options.widths().size(); ++group) {
    const int64_t width = options.widths()[group];
    const int64_t out = options.bottleneck() ? 4 * width : width;
    const bool changes_shape = group > 0 || channels != out;
    const int64_t of_a_block = options.bottleneck() ? 6 * width : 2 * width;
    positions /= group > 0 ? 4 : 1;
    channels = out;
    bytes.push_back(
        (options.blocks()[group] - (changes_shape ? 1 : 0)) * of_a_block *
        (positions * number_bytes + kStatistics));
  }
  return bytes;
}

/// The share of each group in a budget, by the bytes of their results.
///
/// Convolutions of later groups sum over more channels at fewer positions: their
/// results take less, and spare more for each byte. So the last group gets what
/// its results take, then the one before it; after that as much again for whole
/// blocks, in the same order.
inline std::vector<int64_t> shares_of(
    int64_t budget,
    const std::vector<int64_t>& results) {
  std::vector<int64_t> shares(results.size());
  for (int round = 0; round < 2; ++round) {
    for (size_t group = results.size(); group-- > 0;) {
      const int64_t share = std::min(budget, results[group]);
      shares[group] += share;
      budget -= share;
    }
  }
  shares.front() += budget;
  return shares;
}

/// What all groups of a network kept in the last step.
inline memcnn::KeptActivations kept_by(const revnet::RevNetImpl& network) {
  memcnn::KeptActivations sum;
  for (const auto& module : network.modules(/*include_self=*/false)) {
    if (const auto* group = module->as<memcnn::ReversibleSequence>()) {
      sum += group->kept();
    }
  }
  return sum;
}

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <iomanip>
#include <ostream>
#include <sstream>

namespace memcnn {

/// What a memory_budget kept of the last run that recorded a graph.
struct KeptActivations {
  int64_t bytes = 0; // within the budget
  size_t blocks = 0; // that keep all, and do not run again
  size_t results = 0; // of dear operators in the others (Note [Kept results])
  double multiply_adds = 0; // of these operators in all blocks
  double spared = 0; // of these multiply-adds, those that do not run again
};

/// "12.5 MiB: 3 blocks and 96 results, which spare 87 % of the multiply-adds of
/// second runs".
inline std::ostream& operator<<(
    std::ostream& stream,
    const KeptActivations& kept) {
  constexpr double kMiB = 1024.0 * 1024.0;
  const double percent =
      kept.multiply_adds > 0 ? 100 * kept.spared / kept.multiply_adds : 0;
  std::ostringstream words;
  words << std::fixed << std::setprecision(1)
        << static_cast<double>(kept.bytes) / kMiB << " MiB: " << kept.blocks
        << (kept.blocks == 1 ? " block and " : " blocks and ") << kept.results
        << (kept.results == 1 ? " result" : " results") << ", which spare "
        << std::setprecision(0) << percent
        << " % of the multiply-adds of second runs";
  return stream << words.str();
}

} // namespace memcnn

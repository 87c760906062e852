// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string>

namespace memcnn {

/// What a memory_budget kept of the last run that recorded a graph; a sum of
/// these is what several modules keep.
struct KeptActivations {
  KeptActivations& operator+=(const KeptActivations& other) {
    bytes += other.bytes;
    blocks += other.blocks;
    results += other.results;
    multiply_adds += other.multiply_adds;
    spared += other.spared;
    return *this;
  }

  int64_t bytes = 0; // within the budget
  size_t blocks = 0; // that keep all, and do not run again
  size_t results = 0; // of dear operators in the others (Note [Kept results])
  double multiply_adds = 0; // of these operators in all blocks
  double spared = 0; // of these multiply-adds, those that do not run again
};

namespace detail {

/// "3 blocks and 96 results", "1 result", or nothing.
inline std::string words_of_kept(const KeptActivations& kept) {
  std::string words;
  const auto add = [&](size_t count, const char* what) {
    if (count > 0) {
      words += (words.empty() ? "" : " and ") + std::to_string(count) + what +
          (count == 1 ? "" : "s");
    }
  };
  add(kept.blocks, " block");
  add(kept.results, " result");
  return words;
}

} // namespace detail

/// "12.50 MiB: 3 blocks and 96 results, sparing 87 % of the multiply-adds of
/// second runs".
inline std::ostream& operator<<(
    std::ostream& stream,
    const KeptActivations& kept) {
  constexpr double kMiB = 1024.0 * 1024.0;
  const std::string words = detail::words_of_kept(kept);
  if (words.empty()) {
    return stream << "nothing";
  }
  std::ostringstream text;
  text << std::fixed << std::setprecision(2)
       << static_cast<double>(kept.bytes) / kMiB << " MiB: " << words;
  if (kept.multiply_adds > 0) {
    text << ", sparing " << std::setprecision(0)
         << 100 * kept.spared / kept.multiply_adds
         << " % of the multiply-adds of second runs";
  }
  return stream << text.str();
}

} // namespace memcnn

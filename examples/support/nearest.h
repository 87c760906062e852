// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace support {

/// How many characters have to be left out, put in, replaced, or swapped with
/// their neighbour to make one text of the other.
///
/// Source:   Damerau 1964, "A technique for computer detection and correction
///           of spelling errors"; no text is edited twice in one place
///           ("optimal string alignment").
inline size_t edit_distance(std::string_view one, std::string_view other) {
  // Distances of the first i characters of `one` to every start of `other`.
  std::vector<size_t> before, last, next(other.size() + 1);
  std::iota(next.begin(), next.end(), size_t{0});
  for (size_t i = 1; i <= one.size(); ++i) {
    before = std::exchange(last, next);
    next[0] = i;
    for (size_t j = 1; j <= other.size(); ++j) {
      const bool same = one[i - 1] == other[j - 1];
      next[j] = std::min(
          {last[j] + 1, next[j - 1] + 1, last[j - 1] + (same ? 0 : 1)});
      if (i > 1 && j > 1 && one[i - 1] == other[j - 2] &&
          one[i - 2] == other[j - 1]) {
        next[j] = std::min(next[j], before[j - 2] + 1);
      }
    }
  }
  return next.back();
}

inline std::string lower_case(std::string text) {
  for (char& letter : text) {
    letter =
        static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  }
  return text;
}

/// The name that `text` was most likely meant to be: the first that begins with
/// it, else the nearest, where a third of the text at most is wrong. Case does
/// not matter. Empty where there is none.
inline std::string nearest(
    const std::string& text,
    const std::vector<std::string>& names) {
  constexpr size_t kLeastOfAStart = 4; // "--n" begins too many
  const std::string asked = lower_case(text);
  std::string found;
  size_t least = text.size() / 3 + 1;
  for (const std::string& name : names) {
    const bool begins = text.size() >= kLeastOfAStart &&
        lower_case(name).compare(0, text.size(), asked) == 0;
    const size_t distance = begins ? 0 : edit_distance(asked, lower_case(name));
    if (distance < least) {
      least = distance;
      found = name;
    }
  }
  return found;
}

/// A question to put behind a text in a message; empty where nothing is near.
inline std::string did_you_mean(
    const std::string& text,
    const std::vector<std::string>& names) {
  const std::string name = nearest(text, names);
  return name.empty() ? "" : " (did you mean " + name + "?)";
}

} // namespace support

// SPDX-License-Identifier: MIT
#pragma once

#include "train/run/print.h"
#include "train/step/step_result.h"

#include <fmt/format.h>
#include <fmt/ranges.h> // fmt::join(), from fmt 11 on

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

namespace training {

/// The accuracy of a class by its name, or by its number where it has none.
struct NamedAccuracy {
  std::string name;
  double accuracy;
};

/// Of every class that has a test image.
inline std::vector<NamedAccuracy> accuracy_by_class(
    const Evaluation& evaluation,
    const std::vector<std::string>& names) {
  std::vector<NamedAccuracy> found;
  for (size_t i = 0; i < evaluation.classes.size(); ++i) {
    const ClassResult& result = evaluation.classes[i];
    if (result.images > 0) {
      found.push_back(
          {names.empty() ? std::to_string(i) : names[i], result.accuracy()});
    }
  }
  return found;
}

/// Prints the classes that are told best and worst, where they have names.
inline void print_classes(
    const Evaluation& evaluation,
    const std::vector<std::string>& names) {
  if (names.empty()) {
    return;
  }
  auto sorted = accuracy_by_class(evaluation, names);
  std::stable_sort(
      sorted.begin(), sorted.end(), [](const auto& one, const auto& other) {
        return one.accuracy > other.accuracy;
      });
  const auto print = [](const char* which, auto first, auto last) {
    std::vector<std::string> texts;
    for (; first != last; ++first) {
      texts.push_back(
          fmt::format("{} {:.0f} %", first->name, 100 * first->accuracy));
    }
    say("  {:<22}{}", which, fmt::join(texts, ", "));
  };
  const auto shown =
      std::min<std::ptrdiff_t>(5, static_cast<std::ptrdiff_t>(sorted.size()));
  print("best classes", sorted.begin(), sorted.begin() + shown);
  print("worst classes", sorted.rbegin(), sorted.rbegin() + shown);
}

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/kept_choice.h>
#include <memcnn/detail/run_results.h>
#include <memcnn/kept_activations.h>

#include <cstdint>

namespace memcnn::detail {

/// The results of dear operators that one run keeps within a budget of bytes.
/// Give keeper() to its recording, and let it live until the run has ended.
class BudgetedResults {
 public:
  explicit BudgetedResults(int64_t budget)
      : is_asked_(budget > 0),
        choice_(budget),
        results_(choice_, /*position=*/0) {}
  BudgetedResults(const BudgetedResults&) = delete; // results_ has choice_
  BudgetedResults& operator=(const BudgetedResults&) = delete;

  /// Null where the budget keeps nothing.
  ResultKeeper* keeper() {
    return is_asked_ ? &results_ : nullptr;
  }

  /// What it came to.
  KeptActivations kept() const {
    const RunResults::Sums sums = results_.kept();
    KeptActivations kept;
    kept.bytes = choice_.bytes();
    kept.results = sums.count;
    kept.multiply_adds = results_.multiply_adds();
    kept.spared = sums.multiply_adds;
    return kept;
  }

 private:
  bool is_asked_;
  KeptChoice choice_;
  RunResults results_;
};

} // namespace memcnn::detail

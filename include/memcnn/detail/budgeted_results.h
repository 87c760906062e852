// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/kept_choice.h>
#include <memcnn/detail/kept_results.h>
#include <memcnn/detail/run_results.h>
#include <memcnn/kept_activations.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace memcnn::detail {

/// The results of dear operators that one run keeps within a budget of bytes.
/// Give keeper() to its recording, and let it live until the run has ended.
class BudgetedResults final : private ResultKeeper {
 public:
  explicit BudgetedResults(int64_t budget)
      : is_asked_(budget > 0), choice_(budget) {}
  BudgetedResults(const BudgetedResults&) = delete; // choice_ has results_
  BudgetedResults& operator=(const BudgetedResults&) = delete;

  /// Null where the budget keeps nothing.
  ResultKeeper* keeper() {
    return is_asked_ ? this : nullptr;
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
  bool keeps_next() override {
    return true;
  }

  void add(std::shared_ptr<KeptResults> results, size_t call) override {
    results_.add(std::move(results), call);
    results_.enter(choice_, /*position=*/0);
    choice_.make_room();
  }

  bool is_asked_;
  KeptChoice choice_;
  RunResults results_;
};

} // namespace memcnn::detail

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/dear_operators.h>
#include <memcnn/detail/held_bytes.h>
#include <memcnn/detail/kept_choice.h>
#include <memcnn/detail/kept_results.h>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// The results of dear operators in one run, as candidates of a choice: all of
/// them, or those of which an earlier run found that they fit.
class RunResults final : public ResultKeeper {
 public:
  /// Which calls' results are kept, in the order of the run.
  using Which = std::vector<bool>;

  /// All are kept, or those that are known.
  explicit RunResults(const Which* known = nullptr) : known_(known) {}

  /// All are kept, and counted here as count() says.
  explicit RunResults(std::shared_ptr<HeldBytes> held)
      : known_(nullptr), held_(std::move(held)) {}

  RunResults(const RunResults&) = delete; // candidates refer to it
  RunResults& operator=(const RunResults&) = delete;

  bool keeps_next() override {
    const size_t number = calls_.size();
    return known_ == nullptr || (number < known_->size() && (*known_)[number]);
  }

  void add(std::shared_ptr<KeptResults> results, size_t number) override {
    calls_.push_back({std::move(results), number, {}});
  }

  /// Makes those that are kept candidates at this position, but for those that
  /// became so before, and those that are yet to be counted.
  void enter(KeptChoice& choice, size_t position) {
    for (; entered_ < (held_ ? counted_ : calls_.size()); ++entered_) {
      const Call& call = calls_[entered_];
      if (call.is_kept()) {
        choice.add(call.worth(), call.bytes(), position, [this, i = entered_] {
          return calls_[i].give_up();
        });
      }
    }
  }

  /// Counts those that are kept until here.
  void count() {
    for (; counted_ < calls_.size(); ++counted_) {
      Call& call = calls_[counted_];
      for (const at::Tensor& result : call.results->results_of(call.number)) {
        call.shares.push_back(held_->count(result));
      }
    }
  }

  /// Second runs do not come to the calls that are not counted yet.
  void drop_uncounted() {
    for (size_t i = counted_; i < calls_.size(); ++i) {
      calls_[i].give_up();
    }
    calls_.erase(
        calls_.begin() + static_cast<std::ptrdiff_t>(counted_), calls_.end());
  }

  /// The bytes of those whose memory nothing else has that is counted.
  int64_t bytes_alone() const {
    int64_t bytes = 0;
    for (const Call& call : calls_) {
      bytes += call.bytes_alone();
    }
    return bytes;
  }

  /// Gives those of them up that are worth less.
  void give_up_alone(double worth) {
    for (Call& call : calls_) {
      if (call.bytes_alone() > 0 && call.worth() < worth) {
        call.give_up();
      }
    }
  }

  /// Lets those go whose memory nobody else holds; returns their bytes.
  int64_t let_go_unshared() const {
    int64_t bytes = 0;
    for (const Call& call : calls_) {
      bytes += call.results->let_go_unshared(call.number);
    }
    return bytes;
  }

  void let_go() {
    for (Call& call : calls_) {
      call.shares.clear();
      call.results->let_go();
    }
  }

  Which which_are_kept() const {
    Which kept;
    for (const Call& call : calls_) {
      kept.push_back(call.is_kept());
    }
    return kept;
  }

  /// How many calls there were.
  size_t size() const {
    return calls_.size();
  }

  /// The multiply-adds of all calls.
  double multiply_adds() const {
    double sum = 0;
    for (const Call& call : calls_) {
      sum += call.multiply_adds();
    }
    return sum;
  }

  struct Sums {
    size_t count = 0;
    int64_t bytes = 0;
    double multiply_adds = 0;
  };

  /// Of those results that are kept and worth more multiply-adds a byte.
  Sums kept(double worth = 0) const {
    Sums sums;
    for (const Call& call : calls_) {
      if (call.is_kept() && call.worth() > worth) {
        ++sums.count;
        sums.bytes += call.bytes();
        sums.multiply_adds += call.multiply_adds();
      }
    }
    return sums;
  }

 private:
  struct Call {
    bool is_kept() const {
      return results->keeps(number);
    }
    double multiply_adds() const {
      return results->multiply_adds_of(number);
    }
    int64_t bytes() const {
      return results->bytes_of(number);
    }
    double worth() const {
      return multiply_adds() / static_cast<double>(bytes());
    }
    int64_t bytes_alone() const {
      int64_t sum = 0;
      for (const HeldBytes::Share& share : shares) {
        sum += share.bytes_alone();
      }
      return sum;
    }
    int64_t give_up() {
      shares.clear();
      return results->give_up(number);
    }

    std::shared_ptr<KeptResults> results;
    size_t number;
    std::vector<HeldBytes::Share> shares; // while they are counted
  };

  const Which* known_;
  std::shared_ptr<HeldBytes> held_; // null where they are not counted
  std::vector<Call> calls_;
  size_t counted_ = 0; // of the calls, the first ones
  size_t entered_ = 0; // likewise
};

/// Of a run's graph that takes these bytes: of what it spares, and takes beyond
/// those results that are worth more than it (Note [Memory budget], rule 2).
inline double worth_of_graph(int64_t bytes, const RunResults& results) {
  const RunResults::Sums better = results.kept(kMultiplyAddsPerByte);
  const double spared = kMultiplyAddsPerByte * static_cast<double>(bytes) +
      results.multiply_adds() - better.multiply_adds;
  return spared /
      static_cast<double>((std::max)(bytes - better.bytes, int64_t{1}));
}

} // namespace memcnn::detail

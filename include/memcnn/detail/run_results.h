// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/kept_choice.h>
#include <memcnn/detail/kept_results.h>

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

  /// All are kept, as long as they are among the best in the choice, which
  /// learns of each at once.
  RunResults(KeptChoice& choice, size_t position)
      : known_(nullptr), choice_(&choice), position_(position) {}

  bool keeps_next() override {
    const size_t number = calls_.size();
    return known_ == nullptr || (number < known_->size() && (*known_)[number]);
  }

  void add(std::shared_ptr<KeptResults> results, size_t number) override {
    calls_.push_back({std::move(results), number});
    if (choice_ != nullptr) {
      enter(*choice_, calls_.back(), position_);
      choice_->make_room();
    }
  }

  /// Makes those that are kept candidates at this position.
  void enter(KeptChoice& choice, size_t position) const {
    for (const Call& call : calls_) {
      enter(choice, call, position);
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

  void let_go() const {
    for (const Call& call : calls_) {
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

    std::shared_ptr<KeptResults> results;
    size_t number;
  };

  static void enter(KeptChoice& choice, const Call& call, size_t position) {
    if (call.is_kept()) {
      choice.add(
          call.worth(),
          call.bytes(),
          position,
          [results = call.results, number = call.number] {
            return results->give_up(number);
          });
    }
  }

  const Which* known_;
  KeptChoice* choice_ = nullptr;
  size_t position_ = 0;
  std::vector<Call> calls_;
};

} // namespace memcnn::detail

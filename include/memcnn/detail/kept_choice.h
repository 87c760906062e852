// SPDX-License-Identifier: MIT
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <tuple>
#include <utility>

namespace memcnn::detail {

/// Stops at a budget that is none. Place are the parts of where it was given.
template <class... Place>
void check_budget(int64_t bytes, const Place&... place) {
  TORCH_CHECK_VALUE(
      bytes >= 0,
      place...,
      ": expected a memory_budget of 0 or more bytes, but got ",
      bytes,
      ". 0 keeps no activations.");
}

/// What is kept within a budget of bytes, of all that could be: what saves the
/// most work for each byte (Note [Memory budget], rule 2).
class KeptChoice {
 public:
  /// Worth in steps of a quarter, so that what differs by an allocator's whims
  /// is equal; position; order of arrival.
  using Rank = std::tuple<int64_t, size_t, size_t>;
  /// Gives a thing up, and returns the bytes that are free by that.
  using GiveUp = std::function<int64_t()>;

  /// What is kept takes as much as its parts; or as `counted` says, where they
  /// share memory.
  explicit KeptChoice(
      int64_t budget,
      std::function<int64_t()> counted = nullptr)
      : budget_(budget), counted_(std::move(counted)) {}

  /// Something that is worth so many multiply-adds a byte. Of things that are
  /// worth about the same those of higher positions are kept.
  Rank add(double worth, int64_t bytes, size_t position, GiveUp give_up) {
    const Rank rank(class_of(worth), position, count_++);
    bytes_ += bytes;
    candidates_.emplace(rank, std::move(give_up));
    return rank;
  }

  /// The least worth is given up, until the rest fits.
  void make_room() {
    while (is_exceeded() && !candidates_.empty()) {
      give_up(candidates_.begin()->first);
    }
  }

  bool is_exceeded() const {
    return bytes() > budget_;
  }

  /// Unless it was given up already.
  void give_up(const Rank& rank) {
    const auto found = candidates_.extract(rank);
    if (found) {
      bytes_ -= found.mapped()();
    }
  }

  /// What is kept takes these bytes.
  int64_t bytes() const {
    return counted_ ? counted_() : bytes_;
  }

 private:
  static int64_t class_of(double worth) {
    return std::llround(3 * std::log2((std::max)(worth, 1e-9)));
  }

  int64_t budget_;
  std::function<int64_t()> counted_;
  int64_t bytes_ = 0;
  size_t count_ = 0;
  std::map<Rank, GiveUp> candidates_;
};

} // namespace memcnn::detail

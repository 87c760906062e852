// SPDX-License-Identifier: MIT
#pragma once

// How the processes that torchrun started meet.

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace parallel {
namespace detail {

/// An environment variable that torchrun sets.
inline const char* text_of(const char* name) {
  const char* text = std::getenv(name);
  TORCH_CHECK_VALUE(
      text != nullptr,
      "World::join(): expected the environment variable ",
      name,
      ", but it is not set. Start the program with torchrun --no-python.");
  return text;
}

inline int integer_of(const char* name, int least, int most) {
  const char* text = text_of(name);
  int value = 0;
  const char* end = text + std::strlen(text);
  const auto [rest, error] = std::from_chars(text, end, value);
  TORCH_CHECK_VALUE(
      error == std::errc() && rest == end && value >= least && value <= most,
      "World::join(): expected the environment variable ",
      name,
      " to be an integer from ",
      least,
      " to ",
      most,
      ", but got \"",
      text,
      "\". Start the program with torchrun --no-python, which sets it.");
  return value;
}

/// How the ranks of one attempt find each other in a store that serves several.
///
/// torchrun's agent keeps its store over restarts, and what a dead attempt wrote
/// must not be read. TORCHELASTIC_RESTART_COUNT cannot tell attempts apart: each
/// agent counts for itself. So each rank says hello with a random word, and rank
/// 0 answers to every word that it sees with its own, until all have received
/// that: the name of this attempt, which no earlier one had.
class Handshake {
 public:
  Handshake(c10d::Store& store, int rank, int size, std::chrono::milliseconds t)
      : store_(store), rank_(rank), size_(size), timeout_(t) {
    std::random_device random;
    word_ = c10::str(random(), "-", random());
  }

  std::string name() {
    return rank_ == 0 ? receive() : greet();
  }

 private:
  std::string greet() {
    store_.set(hello(rank_), word_);
    if (!comes("welcome/" + word_, timeout_)) {
      check_only(store_.get_to_str(hello(rank_)) == word_);
      check_missing("0");
    }
    const std::string name = store_.get_to_str("welcome/" + word_);
    check_only(store_.add(here(name, rank_), 1) == 1);
    const std::string missing = "missing/" + name;
    if (!comes(missing, timeout_ + kGrace)) { // rank 0 is the first to give up
      check_missing("0");
    }
    const std::string ranks = store_.get_to_str(missing);
    store_.set(heard(name, rank_), "");
    check_missing(ranks);
    return name;
  }

  std::string receive() {
    std::vector<int> missing(static_cast<size_t>(size_ - 1));
    std::iota(missing.begin(), missing.end(), 1);
    const auto end = std::chrono::steady_clock::now() + timeout_;
    while (true) {
      const auto is_here = [&](int rank) {
        return welcome(rank);
      };
      missing.erase(
          std::remove_if(missing.begin(), missing.end(), is_here),
          missing.end());
      if (missing.empty() || std::chrono::steady_clock::now() > end) {
        break;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    const std::string ranks = c10::Join(", ", missing);
    store_.set("missing/" + word_, ranks); // that all may say so
    for (int rank = 1; rank < size_ && !missing.empty(); ++rank) {
      if (store_.check({here(word_, rank)})) { // it hears that from our store
        comes(heard(word_, rank), kGrace);
      }
    }
    check_missing(ranks);
    return word_;
  }

  /// Answers to a rank; whether it has received that.
  bool welcome(int rank) {
    if (store_.check({hello(rank)})) {
      store_.set("welcome/" + store_.get_to_str(hello(rank)), word_);
    }
    return store_.check({here(word_, rank)});
  }

  bool comes(const std::string& key, std::chrono::milliseconds limit) {
    try {
      store_.wait({key}, limit);
      return true;
    } catch (const c10::DistStoreError&) {
      return false;
    }
  }

  void check_only(bool only) const {
    TORCH_CHECK_VALUE(
        only,
        "World::join(): expected each rank once, but got two processes of RANK ",
        rank_,
        ". Give each its own, from 0 to ",
        size_ - 1,
        ", as torchrun does.");
  }

  void check_missing(const std::string& ranks) const {
    TORCH_CHECK(
        ranks.empty(),
        "World::join(): expected ",
        size_,
        " ranks to join within ",
        timeout_.count(),
        " ms, but rank ",
        ranks,
        " did not. See why it did not start, or set WorldOptions::timeout().");
  }

  static std::string hello(int rank) {
    return c10::str("hello/", rank);
  }
  static std::string here(const std::string& name, int rank) {
    return c10::str("here/", name, "/", rank);
  }
  static std::string heard(const std::string& name, int rank) {
    return c10::str("heard/", name, "/", rank);
  }

  /// How long others may need for what takes no time.
  static constexpr std::chrono::milliseconds kGrace = std::chrono::seconds(10);

  c10d::Store& store_;
  int rank_;
  int size_;
  std::chrono::milliseconds timeout_;
  std::string word_;
};

/// Rank 0 serves the store, unless torchrun's agent does.
inline c10d::TCPStoreOptions
store_options(int rank, int size, std::chrono::milliseconds timeout) {
  const char* agent = std::getenv("TORCHELASTIC_USE_AGENT_STORE");
  const bool agent_serves = agent && std::string_view(agent) == "True";
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(integer_of("MASTER_PORT", 1, 65535));
  options.timeout = timeout;
  options.waitWorkers = false;
  options.numWorkers = static_cast<size_t>(size);
  options.isServer = rank == 0 && !agent_serves;
  return options;
}

/// A store that has the keys of this attempt alone.
inline c10::intrusive_ptr<c10d::Store>
meet(int rank, int size, std::chrono::milliseconds timeout) {
  const std::string host = text_of("MASTER_ADDR");
  const c10d::TCPStoreOptions options = store_options(rank, size, timeout);
  try {
    const auto tcp = c10::make_intrusive<c10d::TCPStore>(host, options);
    const auto hall = c10::make_intrusive<c10d::PrefixStore>("parallel", tcp);
    const auto name = Handshake(*hall, rank, size, timeout).name();
    return c10::make_intrusive<c10d::PrefixStore>("parallel/" + name, tcp);
  } catch (const c10::DistError& error) {
    const std::string text = error.what_without_backtrace();
    C10_THROW_ERROR(
        Error,
        c10::str(
            "World::join(): expected a store at MASTER_ADDR \"",
            host,
            "\" and MASTER_PORT ",
            options.port,
            ", but got (",
            text.substr(0, text.find('\n')),
            "). Rank 0 or torchrun's agent opens it: see that it runs, that the "
            "name leads to its machine, and that no other has the port."));
  }
}

} // namespace detail
} // namespace parallel

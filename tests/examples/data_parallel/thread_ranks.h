// SPDX-License-Identifier: MIT
#pragma once

#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <chrono>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace memcnn_test {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

namespace detail {

inline Group
make_group(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size) {
  using Gloo = c10d::ProcessGroupGloo;
  const auto options = Gloo::Options::create(std::chrono::seconds(60));
  options->devices.push_back(Gloo::createDeviceForHostname("127.0.0.1"));
  const auto gloo = c10::make_intrusive<Gloo>(store, rank, size, options);
  auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, size);
  constexpr auto kGloo = c10d::ProcessGroup::BackendType::GLOO;
  group->setBackend(c10::DeviceType::CPU, kGloo, gloo);
  group->setBackend(c10::DeviceType::CUDA, kGloo, gloo);
  group->setDefaultBackend(kGloo);
  return group;
}

} // namespace detail

/// Runs all ranks of a group as threads of this process, with gloo between them:
/// no processes to start. Rethrows what was thrown first.
inline void run_ranks(
    int size,
    const std::function<void(const Group& group)>& run) {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  std::mutex mutex;
  std::exception_ptr first;
  const auto run_one = [&](int rank) {
    Group group; // lives until an error is noted: others then lose their peer
    try {
      group = detail::make_group(store, rank, size);
      run(group);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      first = first ? first : std::current_exception();
    }
  };
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < size; ++rank) {
    ranks.emplace_back(run_one, rank);
  }
  for (std::thread& rank : ranks) {
    rank.join();
  }
  if (first) {
    std::rethrow_exception(first);
  }
}

} // namespace memcnn_test

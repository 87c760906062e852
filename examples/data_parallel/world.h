// SPDX-License-Identifier: MIT
#pragma once

// The processes of a training run, started by torchrun, one a device. Needs
// LibTorch from 2.6 on and the headers of gloo; with PARALLEL_NCCL defined also
// those of NCCL and the CUDA Toolkit.

#include "rendezvous.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/arg.h>
#include <torch/cuda.h>
#include <torch/types.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>
#if defined(PARALLEL_NCCL)
#include <torch/csrc/distributed/c10d/NCCLUtils.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <iterator>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace parallel {

using torch::Tensor;

/// What carries CUDA tensors; gloo carries those on the CPU in any case.
enum class Backend {
  kAutomatic, ///< NCCL where it is compiled in and each process has a GPU of its
  ///< own, else gloo, by which processes share GPUs
  kGloo, ///< through the host's memory; processes may share a GPU
  kNccl,
};

struct WorldOptions {
  /// How long to wait for other ranks: when they join, and in each collective.
  TORCH_ARG(std::chrono::milliseconds, timeout) = std::chrono::minutes(10);
  TORCH_ARG(Backend, backend) = Backend::kAutomatic;
};

namespace detail {

/// The first line in which two texts differ, of each.
inline std::pair<std::string, std::string> first_difference(
    const std::string& a,
    const std::string& b) {
  std::istringstream lines_of_a(a);
  std::istringstream lines_of_b(b);
  std::pair<std::string, std::string> lines;
  std::string line_before;
  do {
    line_before = std::exchange(lines, {}).first;
    std::getline(lines_of_a, lines.first);
    std::getline(lines_of_b, lines.second);
  } while (lines.first == lines.second && (lines_of_a || lines_of_b));
  if (lines.first == lines.second) { // all but the newline at the end
    lines = {line_before, line_before};
    (a.size() > b.size() ? lines.first : lines.second) += "\\n";
  }
  return lines;
}

#if defined(PARALLEL_NCCL)
/// nccl.h says how large some objects are that LibTorch has compiled, too.
inline void check_nccl_header() {
  const std::string library = c10d::getNcclVersion();
  const std::string header = c10::str(NCCL_MAJOR, ".", NCCL_MINOR, ".");
  TORCH_CHECK(
      library.compare(0, header.size(), header) == 0,
      "World::join(): expected a program compiled with the nccl.h of NCCL ",
      library,
      ", which LibTorch uses, but got that of ",
      header,
      NCCL_PATCH,
      ". Compile it with the nccl.h that came with LibTorch.");
}
#endif

} // namespace detail

/// The processes that train together, and what they tell each other.
///
/// Each has a rank from 0 to size - 1. A collective is a call that all of them
/// make, in the same order; it throws where one does not come within the
/// timeout. Copies are handles on the same group.
class World {
 public:
  int rank = 0;
  int size = 1;
  int local_rank = 0; ///< the rank among the processes of this machine
  c10::intrusive_ptr<c10d::Store> store; ///< of this attempt; empty if alone
  c10::intrusive_ptr<c10d::ProcessGroup> group; ///< empty if alone

  /// Meets the other processes that torchrun started, and makes device() the
  /// current one.
  static World join(const WorldOptions& options = {}) {
    TORCH_CHECK_VALUE(
        options.timeout().count() > 0,
        "World::join(): expected a positive timeout, but got ",
        options.timeout().count(),
        " ms.");
    World world;
    world.size = detail::integer_of("WORLD_SIZE", 1, 1 << 20);
    world.rank = detail::integer_of("RANK", 0, world.size - 1);
    world.local_rank = detail::integer_of("LOCAL_RANK", 0, world.size - 1);
    world.store = detail::meet(world.rank, world.size, options.timeout());
    world.group = c10::make_intrusive<c10d::ProcessGroup>(
        world.store, world.rank, world.size);
    world.add_gloo(options.timeout());
    if (world.choose_device(options.backend())) {
      world.add_nccl(options.timeout());
    }
    return world;
  }

  /// One process that has none to talk to: collectives return at once.
  static World alone() {
    World world;
    if (torch::cuda::is_available()) {
      world.device_ = torch::Device(torch::kCUDA, 0);
    }
    return world;
  }

  /// join() where torchrun, or somebody in its place, started the process.
  static World join_or_alone(const WorldOptions& options = {}) {
    const bool started = std::getenv("RANK") || std::getenv("WORLD_SIZE");
    return started ? join(options) : alone();
  }

  /// The device of this process: cuda:LOCAL_RANK, or the CPU where there is no
  /// GPU. Tensors on the CPU may take part in collectives in any case.
  torch::Device device() const {
    return device_;
  }

  /// The sum of a tensor over all ranks, on each of them; outside autograd.
  Tensor sum(const Tensor& tensor) const {
    std::vector<Tensor> one{
        tensor.detach().clone(at::MemoryFormat::Contiguous)};
    if (group) {
      group->allreduce(one)->wait();
    }
    return one[0];
  }

  /// Whether each process has a GPU of its own, cuda:local_rank, where this
  /// machine has `gpus`.
  bool each_has_gpu(int gpus) const {
    const int64_t mine = local_rank < gpus;
    return sum(torch::tensor(mine)).item<int64_t>() == size;
  }

  /// Returns when all ranks have come here.
  void barrier() const {
    sum(torch::zeros({1}));
  }

  /// Gives tensors the values that they have on rank 0, in place.
  void broadcast(const std::vector<Tensor>& tensors) const {
    constexpr size_t kBytesAtOnce = 250 << 20;
    if (group && !tensors.empty()) {
      const torch::NoGradGuard no_grad;
      c10d::broadcast_coalesced(group, tensors, kBytesAtOnce, /*rank=*/0);
    }
  }

  /// The bytes of rank 0, on all ranks.
  std::string broadcast_bytes(std::string bytes) const {
    const Tensor count = torch::tensor(static_cast<int64_t>(bytes.size()));
    broadcast({count});
    bytes.resize(static_cast<size_t>(count.item<int64_t>()));
    if (group && !bytes.empty()) {
      std::vector<Tensor> one{bytes_of(bytes)};
      group->broadcast(one)->wait();
    }
    return bytes;
  }

  /// The bytes of all ranks, on all of them, by rank. They may differ in number.
  std::vector<std::string> gather_bytes(std::string bytes) const {
    if (!group) {
      return {std::move(bytes)};
    }
    Tensor counts = torch::zeros({size}, torch::kLong);
    counts[rank] = static_cast<int64_t>(bytes.size());
    counts = sum(counts);
    const auto longest =
        static_cast<size_t>(std::max<int64_t>(counts.max().item<int64_t>(), 1));
    bytes.resize(longest);
    std::vector<std::string> all(
        static_cast<size_t>(size), std::string(longest, '\0'));
    std::vector<Tensor> mine{bytes_of(bytes)};
    std::vector<std::vector<Tensor>> parts(1);
    std::transform(
        all.begin(), all.end(), std::back_inserter(parts[0]), bytes_of);
    group->allgather(parts, mine)->wait();
    for (size_t other = 0; other < all.size(); ++other) {
      const Tensor count = counts[static_cast<int64_t>(other)];
      all[other].resize(static_cast<size_t>(count.item<int64_t>()));
    }
    return all;
  }

  /// Throws on all ranks if a text is not the same on each. `what` names it; of
  /// a text with several lines the error shows the first that differs.
  void require_same(const std::string& what, const std::string& text) const {
    const std::vector<std::string> all = gather_bytes(text);
    for (size_t other = 1; other < all.size(); ++other) {
      if (all[other] == all[0]) {
        continue;
      }
      const auto lines = detail::first_difference(all[0], all[other]);
      TORCH_CHECK_VALUE(
          false,
          "World::require_same(): expected the same ",
          what,
          " on all ranks, but rank 0 has \"",
          lines.first,
          "\" and rank ",
          other,
          " has \"",
          lines.second,
          "\". Start all of them with the same program, arguments and files.");
    }
  }

 private:
  World() = default;

  static Tensor bytes_of(std::string& bytes) {
    const auto count = static_cast<int64_t>(bytes.size());
    return torch::from_blob(bytes.data(), {count}, torch::kByte);
  }

  template <class T, class Options>
  c10::intrusive_ptr<T> make_backend(const char* name, Options options) const {
    auto keys = c10::make_intrusive<c10d::PrefixStore>(name, store);
    return c10::make_intrusive<T>(std::move(keys), rank, size, options);
  }

  void add_gloo(std::chrono::milliseconds timeout) const {
    using Gloo = c10d::ProcessGroupGloo;
    const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
    const auto options = Gloo::Options::create(timeout);
    options->devices.push_back(
        interface ? Gloo::createDeviceForInterface(interface)
                  : Gloo::createDefaultDevice());
    const auto gloo = make_backend<Gloo>("gloo", options);
    constexpr auto kType = c10d::ProcessGroup::BackendType::GLOO;
    group->setBackend(c10::DeviceType::CPU, kType, gloo);
    group->setBackend(c10::DeviceType::CUDA, kType, gloo);
    group->setDefaultBackend(kType);
  }

  /// Sets device(); whether its tensors travel by NCCL.
  bool choose_device(Backend backend) {
    const int gpus = static_cast<int>(torch::cuda::device_count());
    [[maybe_unused]] const bool own = each_has_gpu(gpus); // all must ask
    bool nccl = backend == Backend::kNccl;
#if defined(PARALLEL_NCCL)
    nccl = nccl || (backend == Backend::kAutomatic && own);
#else
    TORCH_CHECK_VALUE(
        !nccl,
        "World::join(): expected a program with NCCL compiled in for "
        "Backend::kNccl, but it has gloo alone. Define PARALLEL_NCCL.");
#endif
    TORCH_CHECK_VALUE(
        !nccl || local_rank < gpus,
        "World::join(): expected a GPU for each process, but got LOCAL_RANK ",
        local_rank,
        " and ",
        gpus,
        " GPUs. Start fewer processes, or share GPUs with Backend::kGloo.");
    require_same("backend", nccl ? "NCCL" : "gloo");
    if (gpus > 0) {
      const auto index = static_cast<c10::DeviceIndex>(local_rank % gpus);
      device_ = torch::Device(torch::kCUDA, index);
      c10::impl::VirtualGuardImpl(torch::kCUDA).setDevice(device_);
    }
    return nccl;
  }

  void add_nccl([[maybe_unused]] std::chrono::milliseconds timeout) {
#if defined(PARALLEL_NCCL)
    using Nccl = c10d::ProcessGroupNCCL;
    detail::check_nccl_header();
    const auto options = Nccl::Options::create();
    options->timeout = timeout;
    const auto nccl = make_backend<Nccl>("nccl", options);
    constexpr auto kType = c10d::ProcessGroup::BackendType::NCCL;
    group->setBackend(c10::DeviceType::CUDA, kType, nccl);
    group->setDefaultBackend(kType);
    // Without a shutdown NCCL's destructor warns and aborts what still runs,
    // which after an error is right.
    at_end_ = std::shared_ptr<void>(nullptr, [nccl](void*) {
      if (std::uncaught_exceptions() == 0) {
        nccl->shutdown();
      }
    });
#endif
  }

  torch::Device device_ = torch::kCPU;
  std::shared_ptr<void> at_end_; // of the last copy
};

} // namespace parallel

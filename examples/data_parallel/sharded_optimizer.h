// SPDX-License-Identifier: MIT
#pragma once

// An optimiser whose state is shared out over the ranks:
//
//   parallel::ShardedOptimizer<torch::optim::Adam> optimizer(
//       net->parameters(), torch::optim::AdamOptions(1e-3), world.group);
//
// To copy: it needs LibTorch and no other file.

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace parallel {

namespace detail {

using torch::optim::OptimizerParamGroup;

/// The file of an optimiser, in memory.
inline std::string to_bytes(const torch::optim::Optimizer& optimizer) {
  std::ostringstream stream;
  torch::save(optimizer, stream);
  return stream.str();
}

inline void from_bytes(
    const std::string& bytes,
    torch::optim::Optimizer& optimizer,
    at::Device device) {
  std::istringstream stream(bytes);
  torch::load(optimizer, stream, device);
}

inline void send(const std::string& bytes, c10d::ProcessGroup& group, int to) {
  const auto size = static_cast<int64_t>(bytes.size());
  std::vector<at::Tensor> length = {at::full({1}, size, at::kLong)};
  std::vector<at::Tensor> content = {
      at::from_blob(const_cast<char*>(bytes.data()), {size}, at::kByte)};
  group.send(length, to, /*tag=*/0)->wait();
  group.send(content, to, /*tag=*/1)->wait();
}

inline std::string receive(c10d::ProcessGroup& group, int from) {
  std::vector<at::Tensor> length = {at::empty({1}, at::kLong)};
  group.recv(length, from, /*tag=*/0)->wait();
  std::string bytes(static_cast<size_t>(length[0].item<int64_t>()), '\0');
  std::vector<at::Tensor> content = {at::from_blob(
      bytes.data(), {static_cast<int64_t>(bytes.size())}, at::kByte)};
  group.recv(content, from, /*tag=*/1)->wait();
  return bytes;
}

} // namespace detail

/// Steps on each rank a share of the parameters, and sends the result to the
/// others: each rank keeps the state of its share, about 1 / ranks of it (ZeRO
/// stage 1).
///
/// Gradients have to be the same on every rank, as DataParallel makes them; then
/// weights are, bit for bit, those of an `Inner` on every rank. param_groups(),
/// zero_grad() and schedulers work as ever; state() is empty. All ranks call
/// step() and gathered() together.
///
/// Memory:   the state of an Inner by the number of ranks, and 25 MiB while
///           weights travel.
/// Throws:   c10::Error from save(): what gathered() returns is what to save.
/// Avoid if: the state is small: a step sends all parameters once.
/// Source:   Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training
///           Trillion Parameter Models", arXiv:1910.02054.
/// Example:
///   optimizer.step();
///   if (const auto whole = optimizer.gathered()) { // null but on rank 0
///     torch::save(*whole, "optimizer.pt"); // as an unsharded Adam would
///   }
///   torch::load(optimizer, "optimizer.pt"); // with any number of ranks
template <class Inner>
class ShardedOptimizer final : public torch::optim::Optimizer {
  static_assert(
      !std::is_same_v<Inner, torch::optim::LBFGS>,
      "ShardedOptimizer: expected an optimiser that steps each parameter by "
      "itself, but got LBFGS, whose step depends on all of them.");

 public:
  using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
  using ParamGroups = std::vector<torch::optim::OptimizerParamGroup>;

  /// Without a group the process is alone.
  template <class Options>
  ShardedOptimizer(
      const ParamGroups& groups,
      const Options& defaults,
      Group group)
      : Optimizer(groups, std::make_unique<Options>(defaults)),
        group_(std::move(group)),
        make_([defaults](const ParamGroups& share) {
          return std::make_unique<Inner>(share, defaults);
        }) {
    deal_out();
    own_ = make_(share_of(rank()));
  }

  template <class Options>
  ShardedOptimizer(
      std::vector<at::Tensor> parameters,
      const Options& defaults,
      Group group)
      : ShardedOptimizer(
            ParamGroups{{std::move(parameters)}},
            defaults,
            std::move(group)) {}

  /// The closure runs once, on every rank.
  at::Tensor step(LossClosure closure = nullptr) override {
    at::Tensor loss;
    if (closure) {
      const at::AutoGradMode with_graph(true);
      loss = closure();
    }
    check_groups();
    for (size_t i = 0; i < param_groups_.size(); ++i) {
      own_->param_groups()[i].set_options(param_groups_[i].options().clone());
    }
    own_->step();
    const at::NoGradGuard no_grad; // leaves are written in place
    constexpr size_t kBucketBytes = 25 << 20;
    for (int owner = 0; group_ && owner < size(); ++owner) {
      if (!shares_[owner].empty()) {
        c10d::broadcast_coalesced(group_, shares_[owner], kBucketBytes, owner);
      }
    }
    return loss;
  }

  /// The optimiser of this rank's share, to look at: it has the state.
  const Inner& share() const {
    return *own_;
  }

  /// On one rank an Inner with the state of all of them, on the CPU, to be
  /// saved; null on the others, which send theirs. The group needs a backend for
  /// tensors on the CPU.
  std::unique_ptr<Inner> gathered(int root = 0) {
    TORCH_CHECK_VALUE(
        root >= 0 && root < size(),
        "ShardedOptimizer::gathered(): expected a rank from 0 to ",
        size() - 1,
        " for root, but got ",
        root,
        ". Gather on one that exists.");
    const std::string own = detail::to_bytes(*own_);
    if (rank() != root) {
      detail::send(own, *group_, root);
      return nullptr;
    }
    auto whole = make_(param_groups_);
    for (int from = 0; from < size(); ++from) {
      const auto share = make_(share_of(from));
      detail::from_bytes(
          from == rank() ? own : detail::receive(*group_, from),
          *share,
          at::kCPU);
      for (auto& [parameter, state] : share->state()) {
        whole->state()[parameter] = std::move(state);
      }
    }
    return whole;
  }

  void save(torch::serialize::OutputArchive&) const override {
    TORCH_CHECK(
        false,
        "ShardedOptimizer::save(): expected an optimiser with the state of all "
        "parameters, but got the share of rank ",
        rank(),
        ". Save what gathered() returns on rank 0.");
  }

  /// Takes its share of an Inner's file; every rank reads the same one.
  void load(torch::serialize::InputArchive& archive) override {
    check_groups();
    const auto whole = make_(param_groups_);
    whole->load(archive);
    for (size_t i = 0; i < param_groups_.size(); ++i) {
      param_groups_[i].set_options(whole->param_groups()[i].options().clone());
    }
    const auto& share = shares_[rank()];
    const auto taken = make_(share_of(rank()));
    for (const at::Tensor& parameter : share) {
      const auto found = whole->state().find(parameter.unsafeGetTensorImpl());
      if (found != whole->state().end()) {
        taken->state()[found->first] = std::move(found->second);
      }
    }
    own_ = make_(share_of(rank()));
    // By way of bytes, since that moves state to the device of its parameters.
    detail::from_bytes(
        detail::to_bytes(*taken),
        *own_,
        share.empty() ? at::Device(at::kCPU) : share[0].device());
  }

 private:
  int rank() const {
    return group_ ? group_->getRank() : 0;
  }

  int size() const {
    return group_ ? group_->getSize() : 1;
  }

  /// The largest first, each to the rank that has least so far.
  void deal_out() {
    std::vector<at::Tensor> all;
    for (const auto& group : param_groups_) {
      all.insert(all.end(), group.params().begin(), group.params().end());
    }
    std::stable_sort(
        all.begin(), all.end(), [](const at::Tensor& a, const at::Tensor& b) {
          return a.nbytes() > b.nbytes();
        });
    shares_.resize(static_cast<size_t>(size()));
    std::vector<size_t> bytes(shares_.size(), 0);
    for (const at::Tensor& parameter : all) {
      const auto owner = static_cast<size_t>(
          std::min_element(bytes.begin(), bytes.end()) - bytes.begin());
      bytes[owner] += parameter.nbytes();
      shares_[owner].push_back(parameter);
      owners_[parameter.unsafeGetTensorImpl()] = static_cast<int>(owner);
    }
  }

  /// The groups with the parameters of one rank alone.
  ParamGroups share_of(int rank) const {
    ParamGroups groups;
    for (const auto& group : param_groups_) {
      std::vector<at::Tensor> share;
      for (const at::Tensor& parameter : group.params()) {
        if (owners_.at(parameter.unsafeGetTensorImpl()) == rank) {
          share.push_back(parameter);
        }
      }
      groups.emplace_back(std::move(share), group.options().clone());
    }
    return groups;
  }

  void check_groups() const {
    size_t count = 0;
    for (const auto& group : param_groups_) {
      count += group.params().size();
    }
    TORCH_CHECK(
        param_groups_.size() == own_->param_groups().size() &&
            count == owners_.size(),
        "ShardedOptimizer: expected the ",
        owners_.size(),
        " distinct parameters that it was made with, but got ",
        count,
        " in ",
        param_groups_.size(),
        " groups. Make another one after adding parameters.");
  }

  Group group_;
  std::function<std::unique_ptr<Inner>(const ParamGroups&)> make_;
  std::vector<std::vector<at::Tensor>> shares_; // of each rank
  std::unordered_map<const void*, int> owners_;
  std::unique_ptr<Inner> own_;
};

} // namespace parallel

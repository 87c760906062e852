// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/coupling.h>
#include <memcnn/invertible.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// What travels between the blocks of a sequence: one whole tensor, or the two
/// halves of it along some dimension, as long as all blocks want it so
/// (Note [Streams of a sequence], rule 1). May be undefined as a whole.
///
/// Halves travel in the given memory format or, without one, in that of the
/// whole tensor, which has its own again where halves are joined.
class Streams {
 public:
  Streams(at::Tensor whole, std::optional<at::MemoryFormat> half_format)
      : half_format_(half_format) {
    if (half_format_ && whole.defined()) {
      whole_format_ = whole.suggest_memory_format();
    }
    tensors_ = {std::move(whole)};
  }

  /// The tensors in the form that a block takes, given away: the block is then
  /// their only owner, and may overwrite them.
  std::vector<at::Tensor> take_for(const Invertible& block) {
    const std::optional<int64_t> wanted = block.takes_halves_of();
    if (wanted != split_dim_) {
      join();
      if (wanted) {
        split(block.type_name() + ": ", *wanted);
      }
    }
    return std::move(tensors_);
  }

  /// What a block returned, in the form that it took.
  void set(std::vector<at::Tensor> tensors) {
    tensors_ = std::move(tensors);
  }

  at::Tensor take_whole() {
    join();
    return std::move(tensors_[0]);
  }

 private:
  void join() {
    if (split_dim_) {
      at::Tensor whole = tensors_[0].defined()
          ? at::cat({tensors_[0], tensors_[1]}, *split_dim_)
          : at::Tensor();
      tensors_ = {
          whole_format_ && whole.defined() ? whole.contiguous(*whole_format_)
                                           : whole};
      split_dim_.reset();
    }
  }

  void split(const std::string& place, int64_t dim) {
    if (tensors_[0].defined()) {
      const Halves halves = split_halves(place, tensors_[0], dim, half_format_);
      tensors_ = {halves[0], halves[1]};
    } else {
      tensors_ = {at::Tensor(), at::Tensor()};
    }
    split_dim_ = dim;
  }

  std::optional<at::MemoryFormat> half_format_;
  std::optional<at::MemoryFormat> whole_format_; // where it may be another
  std::vector<at::Tensor> tensors_;
  std::optional<int64_t> split_dim_;
};

} // namespace memcnn::detail

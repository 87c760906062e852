// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/halves.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace memcnn::detail {

// Note [Streams of a sequence]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// 1. Between two couplings that split the same dimension the halves travel as
//    two tensors: no chunk, contiguous or cat between blocks, in forward or
//    backward. Other blocks get one whole tensor. A half is a dense tensor of
//    the whole one's memory format, and its gradient is laid out as it is: on
//    tensors with gaps, or of two formats, batch normalisation and convolutions
//    would convert their arguments in every block.
//    memory_format(at::MemoryFormat::ChannelsLast) lets the halves travel in
//    the format that CPU convolutions are fastest in, whatever the network
//    around the sequence has.
// 2. The sequence owns its intermediate tensors, so it updates them in place
//    (y1 = x1 + F(x2) takes x1's memory); never the caller's input, output or
//    gradient.
// 3. Memory that backward needs beyond parameters and their gradients does not
//    grow with depth.

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
  Tensors take_for(const Invertible& block) {
    return take_in(form_for(block), block.type_name());
  }

  /// The form that a block takes: as it is, where that is as good.
  std::optional<int64_t> form_for(const Invertible& block) const {
    return split_dim_ && block.takes_halves_along(*split_dim_)
        ? split_dim_
        : counted_from_the_front(block.takes_halves_of());
  }

  /// Likewise as halves of a dimension, or as one whole without one. `taker`
  /// is named in errors.
  Tensors take_in(std::optional<int64_t> wanted, const std::string& taker) {
    if (wanted != split_dim_) {
      join();
      if (wanted) {
        split(taker + ": ", *wanted);
      }
    }
    return std::move(tensors_);
  }

  /// What a block returned, in the form that it took.
  void set(Tensors tensors) {
    tensors_ = std::move(tensors);
  }

  at::Tensor take_whole() {
    join();
    return std::move(tensors_[0]);
  }

  /// The dimension of which the tensors are halves; none if there is one whole.
  std::optional<int64_t> split_dim() const {
    return split_dim_;
  }

  /// These without their tensors: the form alone, for others.
  Streams form() const {
    Streams form = *this;
    form.tensors_.clear();
    return form;
  }

  /// Others, which travel whole and later in the formats of these.
  Streams whole(at::Tensor tensor) const {
    Streams whole = *this;
    whole.set({std::move(tensor)});
    whole.split_dim_.reset();
    return whole;
  }

 private:
  /// -3 and 1 are one dimension of four: halves of one are halves of the other.
  /// What is no dimension stays as it is, for the message.
  std::optional<int64_t> counted_from_the_front(
      std::optional<int64_t> dim) const {
    const int64_t dims = tensors_[0].defined() ? tensors_[0].dim() : 0;
    return dim && -dims <= *dim && *dim < 0 ? *dim + dims : dim;
  }

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
  Tensors tensors_;
  std::optional<int64_t> split_dim_;
};

} // namespace memcnn::detail

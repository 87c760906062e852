// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/check_branch.h>
#include <memcnn/detail/isometry.h>
#include <memcnn/detail/squeezed.h>
#include <memcnn/invertible.h>

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace memcnn {

/// The module behind Squeeze.
class SqueezeImpl final : public torch::nn::Cloneable<SqueezeImpl>,
                          public detail::Isometry {
 public:
  /// One stride for every dimension after the channels, whatever their number.
  explicit SqueezeImpl(int64_t stride)
      : SqueezeImpl(std::vector<int64_t>{stride}) {}

  /// One for each.
  explicit SqueezeImpl(std::vector<int64_t> strides)
      : strides_(std::move(strides)) {
    TORCH_CHECK_VALUE(
        1 <= strides_.size() && strides_.size() <= 3 &&
            *std::min_element(strides_.begin(), strides_.end()) >= 1,
        "Squeeze::Squeeze(): expected one to three strides from 1 on, but got ",
        strides_,
        ". Give one for all dimensions after the channels, as in Squeeze(2), or "
        "one for each, as in Squeeze({1, 2, 2}).");
  }

  at::Tensor forward(const at::Tensor& input) {
    return TensorMap::forward(input); // AnyModule wants it of this class
  }

  /// As they were given: a single one is for all dimensions.
  const std::vector<int64_t>& strides() const {
    return strides_;
  }

  void reset() override {}

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::Squeeze(strides=" << at::IntArrayRef(strides_) << ")";
  }

 private:
  at::Tensor mapped(Direction direction, at::Tensor input) const override {
    const std::string place = detail::place_of("Squeeze", direction);
    const at::DimVector strides = detail::strides_for(place, input, strides_);
    if (direction == Direction::kForward) {
      detail::check_pixels(place, input, strides);
      return detail::squeezed(input, strides);
    }
    detail::check_channels(place, input, strides);
    return detail::unsqueezed(input, strides);
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return "Squeeze";
  }

  std::vector<int64_t> strides_;
};

/// Trades pixels for channels: moves each block of pixels to the channels of one
/// pixel.
///
/// Shapes:   (N, C, s a), (N, C, s1 a, s2 b) or (N, C, s1 a, s2 b, s3 c) to
///           (N, k C, a, ..), k the product of the strides. Channel c becomes
///           channels k c to k c + k - 1, the pixels of a block in the order of
///           its rows, as in torch::pixel_unshuffle.
/// Dtypes:   floating point; values are moved, not computed.
/// Log-det:  0.
/// Memory:   keeps nothing; makes one copy each way.
/// Accuracy: exact.
/// Throws:   c10::ValueError for sizes that are no multiples of the strides.
/// Source:   Dinh et al. 2017, Density estimation using Real NVP,
///           arXiv:1605.08803, section 3.6. That, and some libraries, order the
///           channels otherwise.
/// Example:
///   memcnn::Squeeze squeeze(2);             // every dimension by 2
///   memcnn::Squeeze in_plane({1, 2, 2});    // not the first one
class Squeeze : public torch::nn::ModuleHolder<SqueezeImpl> {
 public:
  using torch::nn::ModuleHolder<SqueezeImpl>::ModuleHolder;
  using Impl = SqueezeImpl;

  explicit Squeeze(std::initializer_list<int64_t> strides)
      : ModuleHolder(std::vector<int64_t>(strides)) {}
};

} // namespace memcnn

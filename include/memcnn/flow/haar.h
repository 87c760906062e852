// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/check_branch.h>
#include <memcnn/detail/isometry.h>
#include <memcnn/detail/layout.h>
#include <memcnn/detail/ownership.h>
#include <memcnn/detail/squeezed.h>
#include <memcnn/invertible.h>

#include <ATen/Functions.h>
#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/ArrayRef.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string>
#include <utility>

namespace memcnn {
namespace detail {

/// The two entries of each pair along one of a block's dimensions, of which
/// `later` entries of dimensions after it lie between them: views of the
/// channels (N, c, 2, later, *).
inline std::pair<at::Tensor, at::Tensor> pairs_of_channels(
    const at::Tensor& tensor,
    int64_t later) {
  const at::Tensor pairs =
      tensor.unflatten(1, {tensor.size(1) / (2 * later), 2, later});
  return {pairs.select(2, 0), pairs.select(2, 1)};
}

/// Sums and differences of the entries of each block of 2^dims channels, along
/// each of its dimensions, scaled to keep lengths: the orthonormal Haar wavelet
/// of a squeezed tensor. It undoes itself. The tensor is given away: where no
/// graph is built it is overwritten.
inline at::Tensor haar_of_channels(at::Tensor tensor, size_t dims) {
  const double scale = std::pow(0.5, static_cast<double>(dims) / 2);
  if (at::GradMode::is_enabled() && tensor.requires_grad()) {
    at::Tensor result = tensor * scale;
    for (size_t dim = 0; dim < dims; ++dim) {
      const auto [a, b] = pairs_of_channels(result, int64_t{1} << dim);
      result = at::stack({a + b, a - b}, 2).flatten(1, 3);
    }
    return laid_out_as(tensor, result);
  }
  tensor = owned(std::move(tensor));
  tensor.mul_(scale);
  for (size_t dim = 0; dim < dims; ++dim) {
    const auto [a, b] = pairs_of_channels(tensor, int64_t{1} << dim);
    const at::Tensor difference = a - b;
    a.add_(b);
    b.copy_(difference);
  }
  return tensor;
}

} // namespace detail

/// The module behind Haar.
class HaarImpl final : public torch::nn::Cloneable<HaarImpl>,
                       public detail::Isometry {
 public:
  at::Tensor forward(const at::Tensor& input) {
    return TensorMap::forward(input); // AnyModule wants it of this class
  }

  void reset() override {}

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::Haar()";
  }

 private:
  at::Tensor mapped(Direction direction, at::Tensor input) const override {
    const std::string place = detail::place_of("Haar", direction);
    const at::DimVector strides = detail::strides_for(place, input, {2});
    if (direction == Direction::kForward) {
      detail::check_pixels(place, input, strides);
      return detail::haar_of_channels(
          detail::squeezed(input, strides), strides.size());
    }
    detail::check_channels(place, input, strides);
    return detail::unsqueezed(
        detail::haar_of_channels(std::move(input), strides.size()), strides);
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return "Haar";
  }
};

/// Trades pixels for channels by the Haar wavelet: means and differences of each
/// block of 2 x 2 x .. pixels, orthonormal.
///
/// \f[ y_{c k + m} = 2^{-d/2} \sum_{j} (-1)^{m \cdot j} x_{c, j}, \quad
///     k = 2^d \f]
///
/// with the pixels j of a block, and m, as numbers of d bits, the last
/// dimension's lowest.
///
/// Shapes:   those of Squeeze(2). Of the k channels that channel c becomes the
///           first is the mean, times 2^(d/2); in two dimensions the others are
///           differences along the width, the height, and both.
/// Dtypes:   floating point; computed in the input's, outside of autocast.
/// Log-det:  0.
/// Memory:   keeps nothing; makes one copy each way, and one of half the size.
/// Accuracy: rounds twice for each dimension; not for an exact mode.
/// Throws:   c10::ValueError for odd sizes.
/// Source:   Haar 1910, Zur Theorie der orthogonalen Funktionensysteme; in flows
///           Ardizzone et al. 2019, arXiv:1907.02392.
/// Example:
///   memcnn::Haar haar;
///   torch::Tensor y = haar(torch::rand({2, 3, 8, 8})); // (2, 12, 4, 4)
class Haar : public torch::nn::ModuleHolder<HaarImpl> {
 public:
  using torch::nn::ModuleHolder<HaarImpl>::ModuleHolder;
  using Impl = HaarImpl;
};

} // namespace memcnn

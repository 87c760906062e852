// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/invertible.h>
#include <memcnn/log_det.h>

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <memory>
#include <utility>
#include <vector>

namespace memcnn {
namespace detail {

/// Interface: what maps one tensor to one, may take conditions, and may be asked
/// for its log-determinant.
class ConditionalMap {
 public:
  virtual ~ConditionalMap() = default;

  /// The log_det of the result is undefined where it is not asked for.
  virtual WithLogDet map(
      Direction direction,
      const at::Tensor& input,
      const std::vector<at::Tensor>& conditions,
      bool with_log_det) = 0;
};

} // namespace detail

/// An invertible module under conditions, p(x | c): what its given() returns.
///
/// Branches take the half and then their conditions, which have no inverse, are
/// kept until backward as they are, and get gradients, summed over all branches.
/// It refers to the module, whose parameters it shares, and keeps it alive.
///
/// Throws:   c10::ValueError where the module, or a block of it, takes another
///           number of conditions; c10::Error in backward where one changed.
/// Example:
///   auto [z, log_det] = flow->given({features}).forward_with_log_det(x);
///   torch::Tensor sample = flow->given({features}).inverse(z);
class Given {
 public:
  /// For the modules of this library.
  Given(
      std::shared_ptr<torch::nn::Module> owner,
      detail::ConditionalMap& map,
      std::vector<at::Tensor> conditions)
      : owner_(std::move(owner)),
        map_(&map),
        conditions_(std::move(conditions)) {}

  at::Tensor forward(const at::Tensor& input) const {
    return map_->map(Direction::kForward, input, conditions_, false).output;
  }

  /// Undoes forward() under the same conditions.
  at::Tensor inverse(const at::Tensor& output) const {
    return map_->map(Direction::kInverse, output, conditions_, false).output;
  }

  WithLogDet forward_with_log_det(const at::Tensor& input) const {
    return map_->map(Direction::kForward, input, conditions_, true);
  }

  /// The log_det is that of the inverse: the negative of what the forward of
  /// the result has.
  WithLogDet inverse_with_log_det(const at::Tensor& output) const {
    return map_->map(Direction::kInverse, output, conditions_, true);
  }

 private:
  std::shared_ptr<torch::nn::Module> owner_; // null of one on the stack
  detail::ConditionalMap* map_;
  std::vector<at::Tensor> conditions_;
};

} // namespace memcnn

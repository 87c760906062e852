// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/capture.h>
#include <memcnn/detail/dense.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/digits.h>
#include <memcnn/detail/exact_range.h>
#include <memcnn/detail/layout.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/recording.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace memcnn::detail {

// Note [Exact mode]
// ~~~~~~~~~~~~~~~~~
// Floating point addition rounds, so that (x + v) - v is only close to x, and a
// deep chain drifts: gradients of a chain of 200 float32 blocks with ReLUs were
// off by up to 1 % here. CouplingOptions().fractional_bits(k) removes the
// rounding.
//
// 1. Multiples of 2^-k below 2^(24-k) are float32 numbers, and so are their
//    sums and differences as long as they stay in that range: no rounding, so
//    (x + v) - v == x. The input of a coupling and the values of F and G are
//    rounded to such multiples. Reconstruction is then exact at any depth, and
//    gradients equal those of plain autograd of the same, rounded network bit
//    for bit.
// 2. Gradients pass through rounding as if it were not there (straight-through
//    estimator, Bengio et al. 2013, arXiv:1308.3432).
// 3. The range is 2^(digits - k), with 24 digits in float32, 53 in float64, 11
//    in float16 and 8 in bfloat16. Leaving it is an error, looked for after
//    every update by a reduction. On the CPU it comes at once. Other devices
//    keep its result, since the host would wait for it: there it comes with a
//    later call of such a coupling, or with check_exact_range(), which waits.
// 4. It needs an additive law. A product is rounded, so that an affine coupling
//    refuses.
//
// For bits to be the same the recomputation has to use the same kernels as
// forward, and to add gradients in the same order: in this mode halves and
// gradients are dense and of the same strides on every path; the first run of a
// branch builds a graph as the second does, since some layers (LSTM) take other
// kernels without one; and the gradients of a branch's argument are summed
// before they meet the half's own. A sweep over LibTorch's layers holds it. The kernels have to be deterministic:
// CPU kernels of a fixed number of threads are; on CUDA, set
// at::globalContext().setDeterministicCuDNN(true) and setBenchmarkCuDNN(false).

/// Multiples of 2^-k, which floating point numbers add and subtract without
/// rounding as long as they stay below 2^(digits - k) (Note [Exact mode]).
class FixedPoint {
 public:
  explicit FixedPoint(int64_t fractional_bits)
      : fractional_bits_(fractional_bits) {}

  /// The nearest multiples, as a dense tensor. Rounding passes the gradient
  /// straight through, in the same memory format: the kernels of forward,
  /// recomputation and backward are then the same ones on every path.
  at::Tensor round(const at::Tensor& tensor) const {
    return with_gradient_of(tensor, rounded(tensor));
  }

  /// Stops where a call before this one left the range, on a device that notes
  /// it (rule 3).
  void report(std::string place, const at::Tensor& like) const {
    if (capture_of(like.device()) == 0) {
      flag(range(std::move(place), like), like).report();
    }
  }

  /// Stops where values have left the range in which sums are exact, or has the
  /// device note it. `place` begins the message.
  void check_range(std::string place, const at::Tensor& tensor) const {
    const ExactRange exact = range(std::move(place), tensor);
    if (tensor.numel() == 0) {
      return;
    }
    if (notes_ranges(tensor.device())) {
      flag(exact, tensor).note(tensor);
    } else {
      const auto [low, high] = at::aminmax(tensor.detach());
      exact.check(
          (std::max)(-low.item<double>(), high.item<double>()),
          describe(tensor));
    }
  }

 private:
  ExactRange range(std::string place, const at::Tensor& tensor) const {
    const int64_t digits = digits_of(tensor.scalar_type());
    TORCH_CHECK_VALUE(
        fractional_bits_ < digits,
        place,
        "expected fractional_bits below ",
        digits,
        ", the digits of ",
        tensor.scalar_type(),
        ", but got ",
        fractional_bits_,
        ". Set fewer fractional_bits, or convert the input with to().");
    return {std::move(place), fractional_bits_, tensor.scalar_type()};
  }

  static RangeFlag& flag(const ExactRange& range, const at::Tensor& tensor) {
    return RangeFlags::all().of(range, tensor.device());
  }

  at::Tensor rounded(const at::Tensor& tensor) const {
    const at::NoGradGuard without_graph;
    const double scale = std::ldexp(1.0, static_cast<int>(fractional_bits_));
    // Scaling by a power of two is exact.
    return with_strides(
        tensor.mul(scale).round_().mul_(1.0 / scale), dense_strides(tensor));
  }

  int64_t fractional_bits_;
};

/// What a coupling does in the exact mode; outside of it, nothing.
class ExactMode {
 public:
  /// `can_be_exact` says whether the coupling's law can undo rounded values.
  ExactMode(
      const char* coupling,
      bool can_be_exact,
      const std::optional<int64_t>& fractional_bits)
      : coupling_(coupling) {
    if (!fractional_bits) {
      return;
    }
    TORCH_CHECK_VALUE(
        can_be_exact,
        coupling,
        "::",
        coupling,
        "(): expected no fractional_bits, since a product is rounded and "
        "cannot be undone exactly, but got ",
        *fractional_bits,
        ". Use AdditiveCoupling for an exact mode.");
    TORCH_CHECK_VALUE(
        *fractional_bits >= 0 && *fractional_bits < digits_of(at::kDouble),
        coupling,
        "::",
        coupling,
        "(): expected fractional_bits from 0 to 52, but got ",
        *fractional_bits,
        ". 12 to 16 suit float32.");
    grid_.emplace(*fractional_bits);
  }

  /// A half, on the grid.
  at::Tensor round(const at::Tensor& half) const {
    return grid_ ? grid_->round(half) : half;
  }

  /// What a branch says, as the half is updated with it.
  template <class Value>
  Value round(Value value, const at::Tensor& half) const {
    if constexpr (std::is_same_v<Value, at::Tensor>) { // else refused
      if (grid_) {
        return grid_->round(value.to(half.scalar_type()));
      }
    }
    return value;
  }

  /// Stops where halves were out of range in a call before this one, if that was
  /// not told at once.
  void report(const char* map, const at::Tensor& half) const {
    if (grid_ && notes_ranges(half.device())) {
      grid_->report(place_of(map), half);
    }
  }

  /// Stops where a half in forward() or inverse(), `map`, is out of range.
  void check_range(const char* map, const at::Tensor& half) const {
    if (grid_) {
      grid_->check_range(place_of(map), half);
    }
  }

  /// What a branch returns at a half, by `branch`, for the second run to return
  /// the same bits: by the kernels of a run with a graph, which are others for
  /// some layers. A graph that nobody records is thrown away.
  template <class Fn>
  auto first_run(
      const at::Tensor& half,
      const Recording& recording,
      const Fn& branch) const {
    if (!grid_) {
      return branch(half);
    }
    // Gradients of an alias are summed before they are added to the half's own,
    // as in a backward step.
    at::Tensor argument = at::alias(half);
    if (at::GradMode::is_enabled() || !recording.is_recording()) {
      return branch(argument);
    }
    const at::AutoGradMode with_graph(true);
    auto value = branch(argument.requires_grad_());
    if constexpr (std::is_same_v<decltype(value), at::Tensor>) { // else refused
      value = value.detach();
    }
    return value;
  }

 private:
  std::string place_of(const char* map) const {
    return c10::str(coupling_, "::", map, "(): ");
  }

  const char* coupling_;
  std::optional<FixedPoint> grid_;
};

} // namespace memcnn::detail

// SPDX-License-Identifier: MIT
#pragma once

#include <torch/torch.h>

#include <limits>

namespace memcnn_test {

// All tolerances of the tests. Each bounds a relative error of a whole tensor,
// |a - b| / |b| in norms, unless it says otherwise.

// Round trip of one coupling: x against inverse(forward(x)). What is lost is
// the rounding of each update (half a unit in the last place), once more where
// the branch sees the rounded half, times what the branch amplifies: up to
// about ten here, with batch norm on few values.

/// 45 units of 2.2e-16.
inline constexpr double kRoundTripFloat64 = 1e-14;
/// 17 units of 1.2e-7.
inline constexpr double kRoundTripFloat32 = 2e-6;
/// 5 units of 9.8e-4: the branch itself computes in float16 and rounds.
inline constexpr double kRoundTripFloat16 = 5e-3;
/// 5 units of 7.8e-3, likewise.
inline constexpr double kRoundTripBFloat16 = 4e-2;

// Gradients of the memory-saving network against the plain one.

/// At depth 20, as the library promises; the error is near 1e-14 a block.
inline constexpr double kGradientFloat64 = 1e-10;
/// Plain float32 is itself 1e-4 from float64 at depth 9 and more; inversion may
/// at most double that.
inline constexpr double kGradientFloat32 = 2e-4;
/// Both paths round to bfloat16 (7.8e-3) in the branches; a rebuilt input that
/// differs in its last float32 bit may round the other way.
inline constexpr double kGradientAutocast = 2e-2;

/// One coupling: its input is rebuilt to 3 digits (7.8e-3), and layers with
/// kinks take another side now and then. Another mask of a dropout is off by 1.
inline constexpr double kGradientBFloat16 = 0.3;
/// Values of a kernel for inference against those of the one for training: 8
/// units of 1.2e-7.
inline constexpr double kInferenceKernelFloat32 = 1e-6;

/// Second derivatives in float64 are two gradients deep: still far from 1e-10.
inline constexpr double kSecondDerivativeFloat64 = 1e-10;

// Log-determinants: sums of logarithms of some 100 values near 1, against the
// LU factors of the Jacobian.

/// Beside 1, or the value where it is larger: 450,000 units of 2.2e-16, as the
/// Jacobian itself is computed by kernels that round.
inline constexpr double kLogDetFloat64 = 1e-10;

// Central differences with step 1e-6 in float64: cutting off the series costs
// 1e-12, rounding the function 1e-16 / 1e-6 = 1e-10 times its size.

inline constexpr double kDifferenceStep = 1e-6;
/// Per entry, beside the relative one: the rounding of sums of some 100 values.
inline constexpr double kDifferenceAbsolute = 1e-7;
/// Per entry.
inline constexpr double kDifferenceRelative = 1e-5;

// Values of Python MemCNN, stored in float64 and float32: the same formulas on
// the same kernels, but another build may sum in another order.

inline constexpr double kReferenceFloat64 = 1e-12;
/// Gradients pass through an inverse on their side too.
inline constexpr double kReferenceFloat32 = 2e-5;

// Parameters after 20 updates by one kernel against those by an operator each,
// which round after every operation: some units in the last place.

inline constexpr double kFusedUpdateFloat64 = 2e-15;
inline constexpr double kFusedUpdateFloat32 = 1e-6;

/// The round trip of one coupling in a dtype.
inline double round_trip_tolerance(torch::ScalarType dtype) {
  switch (dtype) {
    case torch::kDouble:
      return kRoundTripFloat64;
    case torch::kFloat:
      return kRoundTripFloat32;
    case torch::kHalf:
      return kRoundTripFloat16;
    case torch::kBFloat16:
      return kRoundTripBFloat16;
    default:
      return -std::numeric_limits<double>::infinity(); // nothing passes
  }
}

/// A log-determinant that was computed in a dtype against that in float64,
/// beside 1, or the value where it is larger: each of some 20 logarithms a sample
/// has an error as a round trip has.
inline double log_det_tolerance(torch::ScalarType dtype) {
  return 20 * round_trip_tolerance(dtype);
}

/// Gradients against plain autograd in a dtype.
inline double gradient_tolerance(torch::ScalarType dtype) {
  switch (dtype) {
    case torch::kDouble:
      return kGradientFloat64;
    case torch::kFloat:
      return kGradientFloat32;
    default:
      return -std::numeric_limits<double>::infinity();
  }
}

} // namespace memcnn_test

// SPDX-License-Identifier: MIT

// How many digits a deep flow loses by being rebuilt from its output, and what
// anchors and orthogonal matrices keep of them.

#include "../support/modules.h"
#include "../support/twins.h"

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace memcnn_test {
namespace {

using torch::Tensor;

constexpr int64_t kSteps = 32;
constexpr int64_t kChannels = 12;
/// Of gradients in float32, to float64.
constexpr double kTolerance = 1e-3;

Tensor matrix_of_condition(double condition) {
  const auto rotation = [] {
    return std::get<0>(
        torch::linalg_qr(torch::randn({kChannels, kChannels}, torch::kDouble)));
  };
  const double end = std::log(condition) / 2;
  const Tensor scales = torch::linspace(-end, end, kChannels, torch::kDouble);
  const Tensor left = rotation();
  return left.matmul(scales.exp().diag()).matmul(rotation());
}

/// Steps of a Glow.
memcnn::ReversibleSequence make_flow(
    memcnn::Parametrization parametrization,
    double condition) {
  torch::manual_seed(1);
  memcnn::ReversibleSequence flow;
  for (int64_t k = 0; k < kSteps; ++k) {
    memcnn::Conv1x1 mix(
        kChannels, memcnn::Conv1x1Options().parametrization(parametrization));
    if (parametrization != memcnn::kOrthogonal) {
      mix->set_weight(matrix_of_condition(condition));
    }
    flow->push_back(memcnn::ActNorm(kChannels));
    flow->push_back(mix);
    flow->push_back(memcnn::AffineCoupling(
        memcnn::AffineAdapterSigmoid(WideBranch(kChannels / 2)),
        memcnn::Unchanged()));
  }
  return flow;
}

/// Of all parameters, in one piece, by a loss of output and log-determinants.
Tensor gradient(memcnn::ReversibleSequence& flow, const Tensor& input) {
  flow->zero_grad();
  const auto [z, log_det] = flow->forward_with_log_det(input);
  (0.5 * z.square().flatten(1).sum(1) - log_det).mean().backward();
  std::vector<Tensor> parts;
  for (const Tensor& parameter : flow->parameters()) {
    parts.push_back(parameter.grad().flatten().to(torch::kDouble));
  }
  return torch::cat(parts);
}

/// Relative errors of gradients in float32, of one flow.
class Drift {
 public:
  Drift(memcnn::Parametrization parametrization, double condition)
      : flow_(make_flow(parametrization, condition)),
        input_(torch::randn({2, kChannels, 4, 4})) {
    memcnn::initialize(flow_, input_);
    const memcnn::PlainAutogradGuard plain;
    memcnn::ReversibleSequence twin(
        std::dynamic_pointer_cast<memcnn::ReversibleSequenceImpl>(
            flow_->clone()));
    twin->to(torch::kDouble);
    truth_ = gradient(twin, input_.to(torch::kDouble));
  }

  double with_anchor_every(int64_t blocks) {
    flow_->options.anchor_every(blocks);
    return relative_error(gradient(flow_, input_), truth_);
  }

 private:
  memcnn::ReversibleSequence flow_;
  Tensor input_;
  Tensor truth_;
};

class Conditioned : public testing::TestWithParam<memcnn::Parametrization> {};

TEST_P(Conditioned, GradientsHoldWithAnchors) {
  Drift drift(GetParam(), /*condition=*/2.7);
  EXPECT_LT(drift.with_anchor_every(8), kTolerance);
  EXPECT_LT(drift.with_anchor_every(24), kTolerance);
}

// Errors of a chain multiply, and so do condition numbers.
TEST_P(Conditioned, GradientsAreLostWithoutAnchors) {
  Drift drift(GetParam(), /*condition=*/9);
  EXPECT_GT(drift.with_anchor_every(0), 0.01);
  EXPECT_LT(drift.with_anchor_every(8), kTolerance);
}

std::string name_of(const testing::TestParamInfo<memcnn::Parametrization>& of) {
  return of.param == memcnn::kLU ? "LU" : "Plain";
}
INSTANTIATE_TEST_SUITE_P(
    Drift,
    Conditioned,
    testing::Values(memcnn::kPlain, memcnn::kLU),
    name_of);

TEST(Drift, GradientsOfOrthogonalMatricesHoldWithoutAnchors) {
  EXPECT_LT(
      Drift(memcnn::kOrthogonal, /*condition=*/1).with_anchor_every(0),
      kTolerance);
}

} // namespace
} // namespace memcnn_test

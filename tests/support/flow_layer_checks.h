// SPDX-License-Identifier: MIT
#pragma once

#include "flow_modules.h"
#include "tolerances.h"
#include "twins.h"

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace memcnn_test {

// What every layer of a flow does for streams of any form, beside what the suite
// asks of each invertible module.

/// A layer in float64, with parameters a little away from their start.
template <class Layer>
Layer moved(Layer layer) {
  layer->to(torch::kDouble);
  const torch::NoGradGuard no_grad;
  for (torch::Tensor& parameter : layer->parameters()) {
    parameter.add_(0.2 * torch::randn_like(parameter));
  }
  return layer;
}

/// A run of a layer and its backward step, by hand: the result, its
/// log-determinant, the rebuilt input, its gradient and those of parameters.
inline std::vector<torch::Tensor> run_and_step_back(
    memcnn::Invertible& layer,
    memcnn::Direction direction,
    std::vector<torch::Tensor> parts,
    std::vector<torch::Tensor> grads) {
  const torch::NoGradGuard no_grad;
  memcnn::Recording recording = memcnn::Recording::off();
  memcnn::detail::LogDetSum log_det(parts[0]);
  memcnn::AfterRun after;
  after.kept_inputs.resize(parts.size());
  after.needs_grad.assign(parts.size(), true);
  after.outputs = layer.run_with(
      direction, std::move(parts), memcnn::RunExtras{{}, &log_det}, recording);
  std::vector<torch::Tensor> found = {
      torch::cat(after.outputs, 1), log_det.take()};
  after.grad_outputs = std::move(grads);
  after.has_log_det = true;
  after.grad_log_det = torch::linspace(1, 10, found[1].size(0), torch::kDouble);
  const auto parameters = layer.module().parameters();
  memcnn::ParameterGradients sums(
      parameters, std::vector<bool>(parameters.size(), true));
  memcnn::BeforeRun before =
      layer.backward_step(direction, std::move(after), recording, sums);
  found.push_back(torch::cat(before.inputs, 1));
  found.push_back(torch::cat(before.grad_inputs, 1));
  for (torch::Tensor& gradient : sums.take()) {
    found.push_back(std::move(gradient));
  }
  return found;
}

/// Halves of the channels, of 2/3 and 1/3 of them, give what the whole gives.
inline void halves_equal_whole(
    memcnn::Invertible& layer,
    const torch::Tensor& x) {
  const int64_t first = 2 * x.size(1) / 3;
  const auto halves = [&](const torch::Tensor& whole) {
    return memcnn::detail::Tensors{
        memcnn::detail::dense(whole.narrow(1, 0, first)).clone(),
        memcnn::detail::dense(whole.narrow(1, first, x.size(1) - first))
            .clone()};
  };
  const torch::Tensor grad = torch::randn_like(x);
  for (const auto direction :
       {memcnn::Direction::kForward, memcnn::Direction::kInverse}) {
    const auto expected =
        run_and_step_back(layer, direction, {x.clone()}, {grad.clone()});
    const auto found =
        run_and_step_back(layer, direction, halves(x), halves(grad));
    EXPECT_LT(relative_error(found, expected), 1e-12)
        << memcnn::name_of(direction) << " " << x.sizes();
    EXPECT_LT(relative_error(expected[2], x), kRoundTripFloat64);
  }
}

/// In a sequence, and by itself with ordinary autograd, under a loss in which the
/// log-determinants of two samples weigh 1 and 10.
template <class Layer>
void gradients_match_plain_autograd(Layer layer, const torch::Tensor& value) {
  memcnn::ReversibleSequence saving(layer);
  for (const auto direction :
       {memcnn::Direction::kForward, memcnn::Direction::kInverse}) {
    const torch::Tensor x = value.detach().requires_grad_();
    std::vector<torch::Tensor> leaves = layer->parameters();
    leaves.push_back(x);
    torch::Tensor weights;
    const auto gradients = [&](auto& flow) {
      const auto result =
          map_with_log_det(*flow, direction, made_by_a_layer(x));
      if (!weights.defined()) {
        weights = torch::randn_like(result.output);
      }
      return torch::autograd::grad(
          {(result.output * weights).sum() +
           (result.log_det *
            torch::linspace(1, 10, x.size(0), x.options().requires_grad(false)))
               .sum()},
          leaves);
    };
    const auto expected = gradients(layer);
    EXPECT_LT(relative_error(gradients(saving), expected), kGradientFloat64)
        << memcnn::name_of(direction) << " " << x.sizes();
  }
}

/// log |det| is that of the Jacobian, in both directions.
template <class Layer>
void log_det_matches_jacobian(Layer layer, const torch::Tensor& x) {
  for (const auto direction :
       {memcnn::Direction::kForward, memcnn::Direction::kInverse}) {
    const torch::Tensor expected = log_det_of_jacobian(
        [&](const torch::Tensor& leaf) {
          return map_with_log_det(*layer, direction, leaf).output;
        },
        x);
    const torch::Tensor found = map_with_log_det(*layer, direction, x).log_det;
    EXPECT_TRUE(torch::allclose(found, expected, 1e-10, 1e-10))
        << found << expected;
  }
}

/// The forms that streams come in: vectors, one to three dimensions of pixels,
/// channels last, more channels than pixels and fewer.
inline std::vector<torch::Tensor> streams_of(int64_t channels) {
  const auto normal = [](at::IntArrayRef sizes) {
    return torch::randn(sizes, torch::kDouble);
  };
  return {
      normal({2, channels}),
      normal({2, channels, 3}),
      normal({2, channels, 2, 2}),
      normal({2, channels, 3, 4}),
      normal({2, channels, 3, 4}).contiguous(torch::MemoryFormat::ChannelsLast),
      normal({2, channels, 2, 2, 3}),
      normal({2, channels, 2, 2, 3})
          .contiguous(torch::MemoryFormat::ChannelsLast3d)};
}

} // namespace memcnn_test

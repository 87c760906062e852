// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/exact_range.h>

#include "support/autocast_guard.h"
#include "train/data/batches.h"
#include "train/numerics/blocks.h"
#include "train/numerics/trial_copy.h"
#include "train/step/loss.h"

#include <torch/autograd.h>
#include <torch/nn.h>
#include <torch/types.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace training {

/// How far a value is off, and whose it is.
struct Deviation {
  std::string name; // path of a block, or name of a parameter
  double relative = 0; // norm of the difference by that of the true value
};

/// What recomputation costs in accuracy, for one batch.
struct NumericsReport {
  /// Of the input of every reversible block, as backward rebuilds it: from the
  /// last output of its run, through all later blocks. In order of forward.
  std::vector<Deviation> inverse_errors;
  /// Of the gradient that is the farthest off plain autograd's.
  Deviation gradient;

  Deviation inverse() const;
};

namespace detail {

/// Orders by size; a NaN, which is no size, is the largest.
inline bool is_less_off(const Deviation& a, const Deviation& b) {
  return !std::isnan(a.relative) &&
      (std::isnan(b.relative) || a.relative < b.relative);
}

inline double norm_of(const torch::Tensor& tensor) {
  return tensor.detach().to(torch::kFloat64).norm().item<double>();
}

inline double distance(const torch::Tensor& a, const torch::Tensor& b) {
  return norm_of(a.detach().to(torch::kFloat64) - b.detach());
}

/// Zero of zero is no error, where a quotient would be NaN.
inline double share_of(double difference, double size) {
  return difference == 0 ? 0 : difference / size;
}

inline std::vector<torch::Tensor> gradients_of(
    const torch::Tensor& loss,
    const torch::nn::Module& network) {
  return torch::autograd::grad(
      {loss},
      network.parameters(),
      /*grad_outputs=*/{},
      /*retain_graph=*/std::nullopt,
      /*create_graph=*/false,
      /*allow_unused=*/true);
}

/// The inputs of all blocks, and at the end the logits. The graph of the logits
/// is that of plain autograd, but keeps one tensor for a reversible block.
inline std::vector<torch::Tensor> run_with_kept_inputs(
    const std::vector<NamedBlock>& blocks,
    const torch::Tensor& images) {
  std::vector<torch::Tensor> values{images};
  for (const NamedBlock& block : blocks) {
    values.push_back(
        block.is_reversible() ? block.forward_with_kept_input(values.back())
                              : block.forward(values.back()));
  }
  return values;
}

/// Rebuilds the inputs of reversible blocks from the last output of their run,
/// as backward does, and compares them with the true ones.
inline std::vector<Deviation> inverse_errors_of(
    const std::vector<NamedBlock>& blocks,
    const std::vector<torch::Tensor>& values) {
  const torch::NoGradGuard no_grad;
  std::vector<Deviation> errors;
  torch::Tensor rebuilt;
  std::string run;
  for (size_t i = blocks.size(); i-- > 0;) {
    const NamedBlock& block = blocks[i];
    if (!block.is_reversible()) {
      continue;
    }
    if (block.run != run) {
      run = block.run;
      rebuilt = values[i + 1].detach();
    }
    rebuilt = block.inverse(rebuilt);
    const torch::Tensor truth = block.rounded_input(values[i]);
    errors.push_back(
        {block.path, share_of(distance(rebuilt, truth), norm_of(truth))});
  }
  std::reverse(errors.begin(), errors.end());
  return errors;
}

/// Root mean square of all numbers in the tensors; undefined ones are left out.
inline double root_mean_square(const std::vector<torch::Tensor>& tensors) {
  double squares = 0;
  double count = 0;
  for (const torch::Tensor& tensor : tensors) {
    if (tensor.defined()) {
      squares += std::pow(norm_of(tensor), 2);
      count += static_cast<double>(tensor.numel());
    }
  }
  return std::sqrt(squares / count);
}

/// By parameter, relative to its gradient or, where that is smaller, to one of
/// the network's average size: what a parameter does that the next
/// normalisation undoes, such as the bias of a shortcut, has the gradient 0,
/// and what is computed of it is rounding alone.
inline Deviation largest_deviation(
    const torch::nn::Module& network,
    const std::vector<torch::Tensor>& found,
    const std::vector<torch::Tensor>& expected) {
  const double average = root_mean_square(expected);
  Deviation largest;
  size_t i = 0;
  for (const std::string& name : network.named_parameters().keys()) {
    if (expected[i].defined() && found[i].defined()) {
      const double least =
          average * std::sqrt(static_cast<double>(expected[i].numel()));
      const Deviation deviation{
          name,
          share_of(
              distance(found[i], expected[i]),
              std::max(norm_of(expected[i]), least))};
      if (largest.name.empty() || is_less_off(largest, deviation)) {
        largest = deviation;
      }
    }
    ++i;
  }
  return largest;
}

} // namespace detail

/// The block that is the farthest off.
inline Deviation NumericsReport::inverse() const {
  const auto worst = std::max_element(
      inverse_errors.begin(), inverse_errors.end(), detail::is_less_off);
  return worst == inverse_errors.end() ? Deviation() : *worst;
}

/// Measures on one batch how well a reversible network is rebuilt in backward,
/// and what that does to its gradients. The network, its gradients and the
/// default generators stay as they are.
///
/// Memory:   parameters and their gradients twice, one tensor per block, and the
///           activations of one block at a time: less than plain autograd.
/// Accuracy: inverse errors are those of rebuilding every block, also of those
///           that a memory budget keeps; gradients are those of the run.
/// Throws:   c10::ValueError if values left the range of the exact mode.
inline NumericsReport measure_numerics(
    const revnet::RevNetImpl& network,
    const Batch& batch,
    bool autocast = false) {
  const torch::Device device = batch.images.device();
  TrialCopy copy(network, device);
  NumericsReport report;
  torch::Tensor loss;
  {
    const support::AutocastGuard guard(device.type(), autocast);
    const auto blocks = blocks_of(copy.network());
    const auto values = detail::run_with_kept_inputs(blocks, batch.images);
    report.inverse_errors = detail::inverse_errors_of(blocks, values);
    loss = loss_of(values.back(), batch.labels);
  }
  const auto expected = detail::gradients_of(loss, copy.network());

  copy.rewind_generators();
  {
    const support::AutocastGuard guard(device.type(), autocast);
    loss = loss_of(copy.network().forward(batch.images), batch.labels);
  }
  const auto found = detail::gradients_of(loss, copy.network());
  memcnn::check_exact_range(device); // else the next step would be told
  report.gradient = detail::largest_deviation(copy.network(), found, expected);
  return report;
}

/// What a log holds of it. JSON has no NaN and no infinity: these become null.
inline nlohmann::ordered_json to_json(const NumericsReport& report) {
  auto blocks = nlohmann::ordered_json::array();
  for (const Deviation& error : report.inverse_errors) {
    blocks.push_back({{"block", error.name}, {"error", error.relative}});
  }
  const Deviation inverse = report.inverse();
  return {
      {"inverse_error", inverse.relative},
      {"inverse_error_block", inverse.name},
      {"gradient_deviation", report.gradient.relative},
      {"gradient_deviation_parameter", report.gradient.name},
      {"inverse_errors", blocks}};
}

} // namespace training

// SPDX-License-Identifier: MIT

// memcnn_flow_drift: what rebuilding a chain of a flow's blocks from its output
// costs in digits.

#include "benchmark/flows_command_line.h"
#include "benchmark/flows_config.h"
#include "benchmark/flows_network.h"
#include "benchmark/gradients.h"
#include "benchmark/json_value.h"
#include "benchmark/rows.h"
#include "support/command_line.h"
#include "support/error.h"
#include "support/median.h"
#include "support/version.h"

#include <memcnn/flow/conv1x1.h>
#include <memcnn/flow/initialize.h>
#include <memcnn/plain_autograd.h>
#include <memcnn/sequence.h>

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/types.h>
#include <torch/utils.h>
#include <torch/version.h>
#include <CLI/CLI.hpp>

#include <nlohmann/json.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace benchmark {

namespace {

/// What happens to digits in one chain.
struct Drift {
  std::string matrix;
  double sigma = 0;
  double condition = 1; // of a 1x1 convolution, the median
  int64_t depth = 0;
  // Relative errors; none where values are so far off that a scale is 0, or not
  // finite.
  std::optional<double> round_trip; // of what inverse() rebuilds
  std::optional<double> plain; // of gradients, to float64
  std::vector<std::optional<double>> saving; // likewise, of each --anchor-every
};

/// A level of Glow, its matrices further from orthogonal the larger sigma is.
class DriftingChain {
 public:
  DriftingChain(
      const DriftConfig& config,
      const std::string& matrix,
      double sigma,
      int64_t depth) {
    torch::manual_seed(static_cast<uint64_t>(config.seed));
    flow_ = make_level(4 * config.channels, config.width, matrix, depth);
    for (const auto& module : flow_->modules()) {
      if (auto* mix = module->as<memcnn::Conv1x1Impl>()) {
        spread(*mix, sigma);
      }
    }
    input_ =
        torch::randn({config.batch, config.channels, config.size, config.size});
    memcnn::initialize(flow_, input_);
  }

  double condition() const {
    return support::median(conditions_);
  }

  const at::Tensor& input() const {
    return input_;
  }

  /// The input, rebuilt through all blocks.
  at::Tensor round_trip() {
    const at::NoGradGuard no_grad;
    return flow_->inverse(flow_->forward(input_));
  }

  /// The gradients of all parameters and of the input.
  std::vector<at::Tensor> gradients(int64_t anchor_every) {
    flow_->options.anchor_every(anchor_every);
    return gradients_by(flow_, input_);
  }

  std::vector<at::Tensor> plain_gradients() {
    const memcnn::PlainAutogradGuard plain;
    return gradients_by(flow_, input_);
  }

  std::vector<at::Tensor> true_gradients() {
    const memcnn::PlainAutogradGuard plain;
    memcnn::ReversibleSequence twin(
        std::dynamic_pointer_cast<memcnn::ReversibleSequenceImpl>(
            flow_->clone()));
    twin->to(at::kDouble);
    return gradients_by(twin, input_.to(at::kDouble));
  }

 private:
  /// Adds noise to a matrix.
  void spread(memcnn::Conv1x1Impl& mix, double sigma) {
    const at::NoGradGuard no_grad;
    at::Tensor weight = mix.weight();
    if (sigma > 0) {
      weight = weight + sigma * torch::randn_like(weight);
      mix.set_weight(weight);
    }
    conditions_.push_back(
        at::linalg_cond(weight.to(at::kDouble)).item<double>());
  }

  static std::vector<at::Tensor> gradients_by(
      memcnn::ReversibleSequence& flow,
      const at::Tensor& input) {
    std::vector<at::Tensor> leaves = flow->parameters();
    leaves.push_back(input.detach().requires_grad_());
    forget_gradients(leaves);
    const auto [output, log_det] = flow->forward_with_log_det(leaves.back());
    flow_loss({output}, log_det).backward();
    return gradients_of(leaves);
  }

  memcnn::ReversibleSequence flow_;
  at::Tensor input_;
  std::vector<double> conditions_;
};

/// The error of what `run` returns, if it gets that far.
template <class Run>
std::optional<double> error_of(
    const Run& run,
    const std::vector<at::Tensor>& expected) {
  try {
    const double error = relative_error(run(), expected);
    return std::isfinite(error) ? std::optional(error) : std::nullopt;
  } catch (const c10::Error&) { // the library says what cannot be undone
    return std::nullopt;
  }
}

Drift measure(
    const DriftConfig& config,
    const std::string& matrix,
    double sigma,
    int64_t depth) {
  DriftingChain chain(config, matrix, sigma, depth);
  Drift drift;
  drift.matrix = matrix;
  drift.sigma = sigma;
  drift.condition = chain.condition();
  drift.depth = depth;
  drift.round_trip = error_of(
      [&] { return std::vector<at::Tensor>{chain.round_trip()}; },
      {chain.input()});
  const auto truth = chain.true_gradients();
  drift.plain = error_of([&] { return chain.plain_gradients(); }, truth);
  for (const int64_t anchor_every : config.anchors) {
    drift.saving.push_back(
        error_of([&] { return chain.gradients(anchor_every); }, truth));
  }
  return drift;
}

void print_json(const DriftConfig& config, const Drift& drift) {
  nlohmann::ordered_json errors = {{"plain", detail::json_if(drift.plain)}};
  for (size_t i = 0; i < config.anchors.size(); ++i) {
    errors[std::to_string(config.anchors[i])] =
        detail::json_if(drift.saving[i]);
  }
  const nlohmann::ordered_json json = {
      {"matrix", drift.matrix},
      {"sigma", drift.sigma},
      {"condition", drift.condition},
      {"depth", drift.depth},
      {"channels", 4 * config.channels},
      {"round_trip_error", detail::json_if(drift.round_trip)},
      {"gradient_errors", errors}};
  fmt::print("{}\n", json.dump());
  std::fflush(stdout);
}

void print_table(const DriftConfig& config, const std::vector<Drift>& drifts) {
  fmt::print(
      "Steps of ActNorm, Conv1x1 and affine coupling: {} channels, width {}, "
      "batch {}, {} x {},\nfloat32; memcnn {}, LibTorch {}\n\n",
      4 * config.channels,
      config.width,
      config.batch,
      config.size / 2,
      config.size / 2,
      support::version(),
      TORCH_VERSION);
  const auto words_of = [](std::optional<double> error) {
    return error ? detail::scientific(error) : "lost";
  };
  std::vector<detail::Row> rows = {
      {"1x1", "sigma", "condition", "steps", "round trip", "plain"}};
  for (const int64_t anchor_every : config.anchors) {
    rows[0].push_back(
        anchor_every == 0 ? "saving" : fmt::format("anchors {}", anchor_every));
  }
  for (const Drift& drift : drifts) {
    detail::Row& row = rows.emplace_back();
    row = {
        drift.matrix,
        detail::fixed(drift.sigma, 2),
        detail::fixed(drift.condition, 1),
        std::to_string(drift.depth),
        words_of(drift.round_trip),
        words_of(drift.plain)};
    for (const auto& error : drift.saving) {
      row.push_back(words_of(error));
    }
  }
  detail::print_rows(rows);
  fmt::print(
      "\n"
      "sigma        deviation of what is added to each entry of an orthogonal "
      "matrix\n"
      "round trip   relative error of inverse(forward(x))\n"
      "plain, ...   relative error of all gradients, to plain autograd in "
      "float64\n"
      "anchors k    anchor_every(k): every k-th block's result is kept, 3 blocks "
      "a step\n"
      "lost         values so far off that a block could not be undone\n");
}

void run(const DriftConfig& config) {
  if (config.size % 2 != 0) {
    throw support::Error(fmt::format(
        "expected an even --size, which the squeeze halves, but got {}.",
        config.size));
  }
  at::set_num_threads(static_cast<int>(config.threads));
  std::vector<Drift> drifts;
  for (const std::string& matrix : config.matrices) {
    for (const double sigma : config.sigmas) {
      if (matrix == "orthogonal" && sigma > 0) {
        continue; // it stays orthogonal
      }
      for (const int64_t depth : config.depths) {
        drifts.push_back(measure(config, matrix, sigma, depth));
        if (config.json) {
          print_json(config, drifts.back());
        }
      }
    }
  }
  if (!config.json) {
    print_table(config, drifts);
  }
}

std::optional<DriftConfig> parse(int argc, const char** argv) {
  constexpr double kMostNoise = 10;
  DriftConfig config;
  CLI::App app(
      "What a chain of steps of a Glow (ActNorm, Conv1x1, one-sided affine "
      "coupling) loses in digits\nby being rebuilt from its output, in float32: "
      "of its input, and of gradients of the likelihood,\nwith anchors and "
      "without.",
      "memcnn_flow_drift");
  support::add_common_options(app);
  detail::add_flow(
      app, config, "Steps; comma-separated, a chain of its own each");
  app.add_option(
         "--channels",
         config.channels,
         "Of the input; the squeeze before the steps makes 4 times as many")
      ->transform(support::whole_number(1, detail::kMostInADim / 4));
  app.add_option(
         "--matrix",
         config.matrices,
         "Of the 1x1 convolutions; comma-separated")
      ->delimiter(',')
      ->check(support::one_of(matrix_names()));
  app.add_option(
         "--sigma",
         config.sigmas,
         "Deviation of the noise on each entry of a matrix; comma-separated; "
         "orthogonal ones have none")
      ->delimiter(',')
      ->check(support::number_up_to(kMostNoise));
  app.option_defaults()->group("The measurement");
  detail::add_flow_run(app, config);
  return support::parse(app, argc, argv) ? std::optional(config) : std::nullopt;
}

} // namespace

} // namespace benchmark

int main(int argc, const char** argv) {
  try {
    if (const auto config = benchmark::parse(argc, argv)) {
      benchmark::run(*config);
    }
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "memcnn_flow_drift: {}\n", support::message_of(error));
    return 1;
  }
}

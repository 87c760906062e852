// SPDX-License-Identifier: MIT
#pragma once

// Batch normalisation over the batches of all ranks:
//
//   parallel::SyncBatchNorm norm(torch::nn::BatchNormOptions(64), world.group);
//
// To copy: it needs LibTorch and no other file.

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/var_mean.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/functional/batchnorm.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/pimpl.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <cstdint>
#include <ostream>
#include <tuple>
#include <utility>
#include <vector>

namespace parallel {

namespace detail {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The ranks that exchange; empty where one process is alone.
using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

inline void save_group(AutogradContext& context, const Group& group) {
  if (group) {
    context.saved_data["group"] = c10::IValue::make_capsule(group);
  }
}

inline Group group_of(const AutogradContext& context) {
  const auto found = context.saved_data.find("group");
  return found == context.saved_data.end()
      ? Group()
      : c10::static_intrusive_pointer_cast<c10d::ProcessGroup>(
            found->second.toCapsule());
}

/// The sum over all ranks; its gradient is the sum of all ranks' gradients.
struct SumOverRanks final : torch::autograd::Function<SumOverRanks> {
  static at::Tensor
  forward(AutogradContext* context, const at::Tensor& x, const Group& group) {
    save_group(*context, group);
    std::vector<at::Tensor> sum = {x.clone(at::MemoryFormat::Contiguous)};
    if (group) {
      group->allreduce(sum)->wait();
    }
    return sum[0];
  }

  static variable_list backward(
      AutogradContext* context,
      const variable_list& gradients) {
    return {apply(gradients[0], group_of(*context)), at::Tensor()};
  }
};

/// A row of every rank, (ranks, length), on all of them: the sum of matrices that
/// are zero but for one row, and so the same bits everywhere.
inline at::Tensor rows_of_ranks(const at::Tensor& row, const Group& group) {
  const int64_t before = group ? group->getRank() : 0;
  const int64_t after = group ? group->getSize() - 1 - before : 0;
  const auto padded =
      at::constant_pad_nd(row.unsqueeze(0), {0, 0, before, after});
  return SumOverRanks::apply(padded, group);
}

/// Float32 at least, in which statistics are computed.
inline at::Tensor widened(const at::Tensor& x) {
  return x.to(c10::promoteTypes(x.scalar_type(), at::kFloat));
}

/// A value for each channel, to go with x (N, C, *).
inline at::Tensor along_channels(
    const at::Tensor& values,
    const at::Tensor& x) {
  std::vector<int64_t> sizes(static_cast<size_t>(x.dim()), 1);
  sizes[1] = -1;
  return values.view(sizes);
}

/// All dimensions but that of the channels.
inline std::vector<int64_t> reduced_dims(const at::Tensor& x) {
  std::vector<int64_t> dims = {0};
  for (int64_t dim = 2; dim < x.dim(); ++dim) {
    dims.push_back(dim);
  }
  return dims;
}

/// Of each channel over the batches of all ranks.
struct Statistics {
  at::Tensor mean; // (C,)
  at::Tensor variance; // (C,), biased
  at::Tensor count; // scalar: values of a channel
};

/// Variances are joined by way of the means (Chan et al. 1979), not by sums of
/// squares, which lose digits where a mean is large.
inline Statistics statistics_of(const at::Tensor& x, const Group& group) {
  const int64_t channels = x.size(1);
  const auto dims = reduced_dims(x);
  int64_t count = 1; // not by a division: there may be no channel
  for (const int64_t dim : dims) {
    count *= x.size(dim);
  }
  at::Tensor mean = x.sum(dims);
  at::Tensor variance = mean;
  if (count > 0) {
    std::tie(variance, mean) = at::var_mean(x, dims, /*correction=*/0);
  }
  const auto own =
      at::cat({mean, variance, at::full({1}, count, mean.options())});
  const auto of_ranks =
      rows_of_ranks(own, group)
          .split_with_sizes({channels, channels, 1}, /*dim=*/1);
  const at::Tensor total = of_ranks[2].sum();
  const at::Tensor shares = of_ranks[2] / total; // (ranks, 1)
  mean = (shares * of_ranks[0]).sum(0);
  variance = (shares * (of_ranks[1] + (of_ranks[0] - mean).square())).sum(0);
  return {mean, variance, total};
}

/// In x's dtype and format.
inline at::Tensor normalised(
    const at::Tensor& x,
    const Statistics& statistics,
    const at::Tensor& weight,
    const at::Tensor& bias,
    double eps) {
  const auto scale = at::rsqrt(statistics.variance + eps) * weight;
  at::Tensor y = widened(x) - along_channels(statistics.mean, x);
  y.mul_(along_channels(scale, x)).add_(along_channels(bias, x));
  return y.to(x.scalar_type());
}

/// normalised() with one collective in backward. Keeps the input.
struct Normalise final : torch::autograd::Function<Normalise> {
  static at::Tensor forward(
      AutogradContext* context,
      const at::Tensor& x,
      const at::Tensor& weight,
      const at::Tensor& bias,
      const Statistics& statistics,
      double eps,
      const Group& group) {
    const auto inverse_deviation = at::rsqrt(statistics.variance + eps);
    context->save_for_backward(
        {x,
         weight,
         bias,
         statistics.mean,
         inverse_deviation,
         statistics.count});
    context->saved_data["eps"] = eps;
    save_group(*context, group);
    return normalised(x, statistics, weight, bias, eps);
  }

  static variable_list backward(
      AutogradContext* context,
      const variable_list& gradients) {
    variable_list found = at::GradMode::is_enabled()
        ? gradients_with_graph(*context, gradients[0])
        : gradients_alone(*context, widened(gradients[0]));
    found.resize(6); // nothing for what is no tensor
    return found;
  }

 private:
  static variable_list gradients_alone(
      AutogradContext& context,
      const at::Tensor& dy) {
    const auto saved = context.get_saved_variables();
    const at::Tensor& x = saved[0];
    const at::Tensor& inverse_deviation = saved[4];
    const auto dims = reduced_dims(x);
    at::Tensor centred = widened(x) - along_channels(saved[3], x);
    const auto bias_gradient = dy.sum(dims);
    const auto product = (dy * centred).sum(dims);
    const auto weight_gradient = product * inverse_deviation;
    if (!context.needs_input_grad(0)) {
      return {at::Tensor(), weight_gradient, bias_gradient};
    }
    const auto means =
        (SumOverRanks::apply(
             at::cat({bias_gradient, product}), group_of(context)) /
         saved[5])
            .chunk(2);
    centred.mul_(along_channels(-means[1] * inverse_deviation.square(), x))
        .add_(dy)
        .sub_(along_channels(means[0], x))
        .mul_(along_channels(inverse_deviation * saved[1], x));
    return {centred.to(x.scalar_type()), weight_gradient, bias_gradient};
  }

  /// For second derivatives: statistics are part of the graph, and computed
  /// anew, with all their collectives.
  static variable_list gradients_with_graph(
      AutogradContext& context,
      const at::Tensor& dy) {
    const auto saved = context.get_saved_variables();
    const auto statistics = statistics_of(widened(saved[0]), group_of(context));
    const auto y = normalised(
        saved[0],
        statistics,
        saved[1],
        saved[2],
        context.saved_data.at("eps").toDouble());
    variable_list found(3);
    variable_list inputs;
    for (size_t i = 0; i < found.size(); ++i) {
      if (saved[i].requires_grad()) {
        inputs.push_back(saved[i]);
      }
    }
    variable_list wanted = torch::autograd::grad(
        {y}, inputs, {dy}, /*retain_graph=*/true, /*create_graph=*/true);
    for (size_t i = 0, j = 0; i < found.size(); ++i) {
      if (saved[i].requires_grad()) {
        found[i] = std::move(wanted[j++]);
      }
    }
    return found;
  }
};

} // namespace detail

/// Normalises each channel by the statistics of the batches of all ranks, as
/// torch::nn::BatchNorm of the whole batch does.
///
/// One collective in forward and one in backward, so that every rank has to run
/// the same layers in the same order, and the same ones again in backward: with
/// one memory budget on all ranks. Ranks may have batches of different sizes,
/// and an empty one, too. In eval mode nothing is exchanged. Options, names and
/// initial values are those of BatchNorm, whose weights it loads and saves.
///
/// Shapes:   input, output (N, C, *).
/// Dtypes:   floating point; float16 and bfloat16 are computed in float32.
/// Memory:   keeps the input for backward.
/// Accuracy: gradients and running statistics within 1e-10 of BatchNorm's on the
///           whole batch in float64; second derivatives, too.
/// Throws:   c10::TypeError if the input is not floating point; c10::ValueError
///           if it is not (N, C, *), if ranks have not as many channels each, or,
///           on a CPU, if they have less than two values of a channel together
///           (a GPU would have to be waited for).
/// Avoid if: each rank's own batch is large enough for statistics of its own.
/// Source:   Ioffe and Szegedy 2015, "Batch Normalization", arXiv:1502.03167.
class SyncBatchNormImpl final : public torch::nn::NormImplBase<
                                    /*D=*/0,
                                    SyncBatchNormImpl,
                                    torch::nn::BatchNormOptions> {
 public:
  /// Without a group the process is alone.
  SyncBatchNormImpl(
      const torch::nn::BatchNormOptions& options_,
      c10::intrusive_ptr<c10d::ProcessGroup> group)
      : NormImplBase(options_), group_(std::move(group)) {}

  at::Tensor forward(const at::Tensor& input) {
    _check_input_dim(input);
    if (!is_training()) {
      return torch::nn::functional::batch_norm(
          input,
          running_mean,
          running_var,
          torch::nn::functional::BatchNormFuncOptions()
              .weight(weight)
              .bias(bias)
              .training(!running_mean.defined())
              .eps(options.eps()));
    }
    const auto statistics = exchange_statistics(input);
    track(statistics);
    const auto kind = statistics.mean.options();
    const auto channels = options.num_features();
    return detail::Normalise::apply(
        input,
        weight.defined() ? weight : at::ones({channels}, kind),
        bias.defined() ? bias : at::zeros({channels}, kind),
        statistics,
        options.eps(),
        group_);
  }

  void pretty_print(std::ostream& stream) const override {
    stream << std::boolalpha << "parallel::SyncBatchNorm("
           << options.num_features() << ", eps=" << options.eps()
           << ", momentum=";
    options.momentum() ? stream << *options.momentum() : stream << "None";
    stream << ", affine=" << options.affine()
           << ", track_running_stats=" << options.track_running_stats() << ")";
  }

 private:
  void _check_input_dim(const at::Tensor& input) override {
    TORCH_CHECK_VALUE(
        input.dim() >= 2 && input.size(1) == options.num_features(),
        "SyncBatchNorm::forward(): expected (N, C, *) with ",
        options.num_features(),
        " channels, but got sizes ",
        input.sizes(),
        ". Give num_features as many as the input has.");
    TORCH_CHECK_TYPE(
        input.is_floating_point(),
        "SyncBatchNorm::forward(): expected a floating point input, but got ",
        input.dtype(),
        ". Cast it.");
  }

  detail::Statistics exchange_statistics(const at::Tensor& input) {
    const at::NoGradGuard no_grad;
    check_channels(input.device());
    auto statistics = detail::statistics_of(detail::widened(input), group_);
    TORCH_CHECK_VALUE(
        !input.is_cpu() || statistics.count.item<double>() > 1,
        "SyncBatchNorm::forward(): expected two values of a channel or more on "
        "all ranks together, but got ",
        statistics.count.item<double>(),
        ". Train with a larger batch, or call eval().");
    return statistics;
  }

  /// Once, since it takes a collective: those of other sizes do not end.
  void check_channels(const at::Device& device) {
    if (has_checked_ || !group_) {
      return;
    }
    const auto kind = at::TensorOptions(device).dtype(at::kLong);
    const auto channels = detail::rows_of_ranks(
        at::full({1}, options.num_features(), kind), group_);
    TORCH_CHECK_VALUE(
        channels.eq(options.num_features()).all().item<bool>(),
        "SyncBatchNorm::forward(): expected as many channels on every rank, but "
        "got ",
        options.num_features(),
        " on rank ",
        group_->getRank(),
        " and others elsewhere. Build the same network on all ranks.");
    has_checked_ = true;
  }

  /// As BatchNorm does, where there are running statistics.
  void track(const detail::Statistics& statistics) {
    if (!running_mean.defined()) {
      return;
    }
    const at::NoGradGuard no_grad;
    double momentum = options.momentum().value_or(0);
    if (num_batches_tracked.defined()) {
      num_batches_tracked += 1;
      if (!options.momentum()) {
        momentum = 1 / num_batches_tracked.item<double>();
      }
    }
    const auto& count = statistics.count;
    const auto unbiased = statistics.variance * (count / (count - 1));
    running_mean.lerp_(statistics.mean.to(running_mean.options()), momentum);
    running_var.lerp_(unbiased.to(running_var.options()), momentum);
  }

  detail::Group group_;
  bool has_checked_ = false;
};

TORCH_MODULE(SyncBatchNorm);

} // namespace parallel

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/capture.h>
#include <memcnn/detail/checked_map.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/generator_state.h>
#include <memcnn/detail/gradient.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/in_destructor.h>
#include <memcnn/detail/jacobian.h>
#include <memcnn/detail/log_det_sum.h>
#include <memcnn/detail/signature.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace memcnn {

/// Options of is_invertible_module() and check_invertible_module().
struct IsInvertibleOptions {
  /// Largest absolute error of a round trip, per value; a log-determinant, a sum
  /// over the values of a sample, may be off by as many times that.
  /// Default: 1e-6.
  TORCH_ARG(double, atol) = 1e-6;
  /// Largest error beyond that, relative to the value. Default: 1e-5.
  TORCH_ARG(double, rtol) = 1e-5;
  /// Seed of the test inputs and of what the module draws. Default: 42.
  TORCH_ARG(uint64_t, random_seed) = 42;
  /// The conditions of every run, as given() takes them. Default: none.
  TORCH_ARG(std::vector<at::Tensor>, conditions) = {};
};

/// What check_invertible_module() found.
struct InvertibilityReport {
  /// Both round trips are within the tolerances, and so are log-determinants
  /// where the module has them.
  bool invertible = false;
  /// Largest |inverse(forward(x)) - x| over all values and inputs.
  double round_trip_error = std::numeric_limits<double>::infinity();
  /// Largest |forward(inverse(y)) - y| over all values and outputs.
  double inverse_round_trip_error = std::numeric_limits<double>::infinity();
  /// How far gradients are off at the rebuilt input instead of the true one:
  /// norm of the difference by the norm of the true gradient, over inputs,
  /// conditions and parameters. It is what training with a wrapper or sequence
  /// adds. Log-determinants are part of what is differentiated.
  double gradient_error = std::numeric_limits<double>::infinity();
  /// Largest |log_det - log |det J||, J the Jacobian: of each sample where samples
  /// do not depend on each other, and of the batch as a whole. Infinite where the
  /// module has no log-determinant, or the inputs more than 512 values.
  double log_det_error = std::numeric_limits<double>::infinity();
  /// Largest |log_det of forward at x + log_det of inverse at y| over samples.
  /// Infinite where the module has no log-determinant.
  double inverse_log_det_error = std::numeric_limits<double>::infinity();
  /// Findings that do not make a module less invertible, such as an output
  /// that shares its input's storage.
  std::vector<std::string> warnings;
  /// Why not, in words; empty if invertible.
  std::string reason;
};

/// Sizes of one or several inputs: {2, 64, 8, 8} or {{2, 64}, {2, 64}}.
class InputShapes {
  /// A number that is no shape: keeps {{1}, {2}} from being read as {1, 2}.
  struct Extent {
    Extent(int64_t value_) : value(value_) {}
    int64_t value;
  };

 public:
  InputShapes(std::initializer_list<Extent> shape) : shapes_(1) {
    for (const Extent extent : shape) {
      shapes_[0].push_back(extent.value);
    }
  }
  InputShapes(std::initializer_list<std::initializer_list<int64_t>> shapes)
      : shapes_(shapes.begin(), shapes.end()) {}
  InputShapes(std::vector<int64_t> shape) : shapes_{std::move(shape)} {}
  InputShapes(at::IntArrayRef shape) : shapes_{shape.vec()} {}
  InputShapes(std::vector<std::vector<int64_t>> shapes)
      : shapes_(std::move(shapes)) {}

  const std::vector<std::vector<int64_t>>& get() const {
    return shapes_;
  }

 private:
  std::vector<std::vector<int64_t>> shapes_;
};

namespace detail {

/// Leaves a module's parameters and buffers and the default generators as they
/// were found.
class CheckGuard {
 public:
  CheckGuard(torch::nn::Module& module, at::Device device)
      : generators_(device) {
    add(module.parameters());
    add(module.buffers());
  }
  CheckGuard(const CheckGuard&) = delete;
  CheckGuard& operator=(const CheckGuard&) = delete;
  ~CheckGuard() {
    in_destructor([&] {
      for (const Found& each : found_) {
        if (each.tensor.equal(each.value)) {
          continue; // and may be what expand() made, which cannot be written
        }
        rewind(each.tensor, each.value, each.version);
      }
    });
  }

 private:
  void add(const std::vector<at::Tensor>& tensors) {
    for (const at::Tensor& tensor : tensors) {
      if (tensor.defined()) {
        found_.push_back({tensor, tensor.detach().clone(), version_of(tensor)});
      }
    }
  }

  GeneratorGuard generators_;
  std::vector<Found> found_;
};

class InvertibilityCheck {
 public:
  InvertibilityCheck(
      Invertible& block,
      const InputShapes& shapes,
      const IsInvertibleOptions& options)
      : block_(block), shapes_(shapes), options_(options) {}

  InvertibilityReport run() {
    const at::Tensor like = first_parameter();
    const at::Device device = like.device();
    check_eager(
        device,
        "check_invertible_module(): expected",
        "compares values on the host",
        "Check before the capture.");
    const CheckGuard as_found(block_.module(), device);
    try {
      compare(draw_inputs(like), device);
    } catch (const c10::Error& error) {
      fail(error.what_without_backtrace());
    } catch (const std::exception& error) {
      fail(error.what());
    }
    return report_;
  }

 private:
  void fail(const std::string& reason) {
    report_.invertible = false;
    report_.reason = reason;
  }

  /// Inputs take dtype and device of the first parameter.
  at::Tensor first_parameter() const {
    for (const at::Tensor& parameter : block_.module().parameters()) {
      if (parameter.defined() && parameter.is_floating_point()) {
        return parameter;
      }
    }
    return at::empty({0});
  }

  Tensors draw_inputs(const at::Tensor& like) const {
    at::Generator generator =
        at::make_generator<at::CPUGeneratorImpl>(options_.random_seed());
    Tensors inputs;
    for (const auto& shape : shapes_.get()) {
      // Drawn on the CPU, so that a seed means the same on every device.
      inputs.push_back(
          at::randn(shape, generator, at::TensorOptions(at::kFloat))
              .to(like.options().requires_grad(false)));
    }
    return inputs;
  }

  void compare(const Tensors& inputs, at::Device device) {
    seed(device);
    const Tensors outputs = apply(Direction::kForward, inputs);
    warn_of_shared_storage(inputs);
    has_log_det_ = gives_log_det(inputs);
    const Tensors rebuilt = apply(Direction::kInverse, outputs);
    const Tensors again = apply(Direction::kForward, rebuilt);

    if (!compare_all(inputs, rebuilt, report_.round_trip_error)) {
      differs("inverse(forward(x)) differs from x", report_.round_trip_error);
    }
    if (!compare_all(outputs, again, report_.inverse_round_trip_error)) {
      differs(
          "forward(inverse(y)) differs from y",
          report_.inverse_round_trip_error);
    }
    report_.gradient_error = gradient_error(inputs, rebuilt, device);
    if (has_log_det_) {
      compare_log_dets(inputs, outputs, rebuilt, device);
    }
    report_.invertible = report_.reason.empty();
  }

  void differs(const char* what, double error) {
    add_reason(c10::str(
        what,
        " by up to ",
        error,
        " (atol ",
        options_.atol(),
        ", rtol ",
        options_.rtol(),
        ")"));
  }

  /// The first one is reported: others may follow from it.
  void add_reason(std::string reason) {
    if (report_.reason.empty()) {
      report_.reason = std::move(reason);
    }
  }

  /// Whether the module says a log-determinant of such inputs.
  bool gives_log_det(const Tensors& inputs) {
    if (block_.log_det() == LogDet::kUnknown || count_values(inputs) == 0) {
      return false;
    }
    try {
      LogDetSum log_det(inputs[0]);
      apply(Direction::kForward, inputs, &log_det);
      return true;
    } catch (const c10::ValueError& error) { // as of the samples' own dimension
      report_.warnings.push_back(c10::str(
          "log_det_error is not measured: ", error.what_without_backtrace()));
      return false;
    }
  }

  /// Runs the module on its own terms: on the conditions, and with a sum that its
  /// log-determinant is added to, or none.
  Tensors run(
      Direction direction,
      Tensors inputs,
      at::TensorList conditions,
      LogDetSum* log_det = nullptr) {
    Recording off = Recording::off();
    return block_.run_with(
        direction, std::move(inputs), RunExtras{conditions, log_det}, off);
  }

  /// Runs it on copies: one that works in place must not hide its error.
  Tensors apply(
      Direction direction,
      const Tensors& inputs,
      LogDetSum* log_det = nullptr) {
    const at::NoGradGuard no_grad;
    return run(direction, copies_of(inputs), options_.conditions(), log_det);
  }

  static Tensors copies_of(const Tensors& inputs) {
    Tensors copies;
    for (const at::Tensor& input : inputs) {
      copies.push_back(input.clone());
    }
    return copies;
  }

  bool compare_all(const Tensors& expected, const Tensors& found, double& error)
      const {
    TORCH_CHECK(
        expected.size() == found.size(),
        "a round trip returns ",
        found.size(),
        " tensors for ",
        expected.size());
    error = 0;
    bool close = true;
    for (size_t i = 0; i < expected.size(); ++i) {
      TORCH_CHECK(
          TensorMeta(expected[i]).fits(found[i]),
          "a round trip turns ",
          describe(expected[i]),
          " into ",
          describe(found[i]));
      if (expected[i].numel() == 0) {
        continue;
      }
      const at::Tensor a = expected[i].detach().to(at::kDouble);
      const at::Tensor b = found[i].detach().to(at::kDouble);
      const double distance = at::amax((a - b).abs()).item<double>();
      // NaN compares false with everything: keep it visible.
      error = std::isnan(distance) ? distance : (std::max)(error, distance);
      close = close && at::allclose(b, a, options_.rtol(), options_.atol());
    }
    return close;
  }

  void compare_log_dets(
      const Tensors& inputs,
      const Tensors& outputs,
      const Tensors& rebuilt,
      at::Device device) {
    LogDetSum there(inputs[0]);
    LogDetSum back(outputs[0]);
    double error = 0;
    if (!compare_all(
            outputs, apply(Direction::kForward, inputs, &there), error)) {
      differs("forward_with_log_det() differs from forward()", error);
    }
    if (!compare_all(
            rebuilt, apply(Direction::kInverse, outputs, &back), error)) {
      differs("inverse_with_log_det() differs from inverse()", error);
    }
    const int64_t values = count_values(inputs);
    const at::Tensor log_det = there.take().to(at::kCPU, at::kDouble);
    const int64_t of_sample = values / log_det.numel();
    const at::Tensor minus = -back.take().to(at::kCPU, at::kDouble);
    report_.inverse_log_det_error = 0;
    if (!compare_sums(
            log_det, minus, of_sample, report_.inverse_log_det_error)) {
      differs(
          "the log-determinant of inverse(y) differs from minus that of "
          "forward(x)",
          report_.inverse_log_det_error);
    }
    if (values > kMostValues) {
      report_.warnings.push_back(c10::str(
          "log_det_error is not measured: the Jacobian of ",
          values,
          " values is large; check inputs of at most ",
          kMostValues));
    } else if (count_values(outputs) != values) {
      add_reason(c10::str(
          "a log-determinant needs as many outputs as inputs, but forward() "
          "turns ",
          values,
          " values into ",
          count_values(outputs)));
    } else {
      compare_with_jacobian(inputs, log_det, device);
    }
  }

  void compare_with_jacobian(
      const Tensors& inputs,
      const at::Tensor& log_det,
      at::Device device) {
    seed(device);
    const at::AutoGradMode with_graph(true);
    const Tensors leaves = leaves_of(inputs);
    const Tensors outputs =
        run(Direction::kForward, copies_of(leaves), options_.conditions());
    const JacobianLogDets expected = jacobian_log_dets(outputs, leaves);

    double& error = report_.log_det_error;
    error = 0;
    const int64_t values = count_values(inputs);
    bool close = compare_sums(expected.of_all, log_det.sum(), values, error);
    if (expected.of_samples.defined()) {
      close =
          compare_sums(
              expected.of_samples, log_det, values / log_det.numel(), error) &&
          close;
    }
    if (!close) {
      differs("the log-determinant differs from that of the Jacobian", error);
    }
  }

  /// Compares sums over as many values each, and takes the largest error.
  bool compare_sums(
      const at::Tensor& expected,
      const at::Tensor& found,
      int64_t values,
      double& error) const {
    const double distance = at::amax((found - expected).abs()).item<double>();
    if (!(distance <= error)) { // NaN stays visible
      error = std::isnan(error) ? error : distance;
    }
    const double atol = options_.atol() * static_cast<double>(values);
    return at::allclose(found, expected, options_.rtol(), atol) &&
        at::isfinite(found).all().item<bool>();
  }

  void warn_of_shared_storage(const Tensors& inputs) {
    // Seen without copies, as a caller would call it.
    const at::NoGradGuard no_grad;
    const Tensors originals = copies_of(inputs);
    const Tensors direct =
        run(Direction::kForward, originals, options_.conditions());
    for (size_t i = 0; i < originals.size(); ++i) {
      for (size_t j = 0; j < direct.size(); ++j) {
        if (direct[j].has_storage() && direct[j].is_alias_of(originals[i])) {
          report_.warnings.push_back(c10::str(
              "output ",
              j,
              " shares the storage of input ",
              i,
              ": a wrapper keeps that input instead of freeing it"));
        }
      }
      if (!originals[i].equal(inputs[i])) {
        report_.warnings.push_back(
            c10::str("forward() changes input ", i, " in place"));
      }
    }
  }

  void seed(at::Device device) const {
    for (const at::Device each : {at::Device(at::kCPU), device}) {
      at::Generator generator = at::globalContext().defaultGenerator(each);
      const std::lock_guard<std::mutex> lock(generator.mutex());
      generator.set_current_seed(options_.random_seed());
    }
  }

  /// Copies that need a gradient, if they can have one.
  static Tensors leaves_of(const Tensors& tensors) {
    Tensors leaves;
    for (const at::Tensor& tensor : tensors) {
      leaves.push_back(
          tensor.detach().clone().requires_grad_(tensor.is_floating_point()));
    }
    return leaves;
  }

  /// Gradients of sum(y * w) for fixed random w, with the log-determinant as one
  /// more y, by inputs, conditions and parameters.
  Tensors gradients(const Tensors& at_inputs, at::Device device) {
    seed(device);
    const at::AutoGradMode with_graph(true);
    Tensors leaves = leaves_of(at_inputs);
    const Tensors conditions = leaves_of(options_.conditions());
    std::optional<LogDetSum> log_det;
    if (has_log_det_) {
      log_det.emplace(leaves[0]);
    }
    // Copies of leaves: a module may change its argument in place.
    Tensors outputs =
        run(Direction::kForward,
            copies_of(leaves),
            conditions,
            log_det ? &*log_det : nullptr);
    if (log_det) {
      outputs.push_back(log_det->take());
    }
    leaves = differentiable_of(joined(std::move(leaves), conditions));
    Tensors weights;
    for (const at::Tensor& output : outputs) {
      weights.push_back(
          output.is_floating_point() ? at::randn_like(output) : at::Tensor());
    }
    Ends ends(leaves, block_.module());
    ends.reach_all();
    return local_gradient(
        std::move(outputs),
        std::move(weights),
        leaves,
        trained_parameters(block_.module()),
        std::move(ends));
  }

  static Tensors differentiable_of(const Tensors& tensors) {
    Tensors result;
    std::copy_if(
        tensors.begin(),
        tensors.end(),
        std::back_inserter(result),
        [](const at::Tensor& tensor) { return tensor.requires_grad(); });
    return result;
  }

  double gradient_error(
      const Tensors& inputs,
      const Tensors& rebuilt,
      at::Device device) {
    const Tensors expected = gradients(inputs, device);
    const Tensors found = gradients(rebuilt, device);
    double difference = 0;
    double norm = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      if (expected[i].defined() && found[i].defined()) {
        const at::Tensor a = expected[i].to(at::kDouble);
        difference +=
            (found[i].to(at::kDouble) - a).square().sum().item<double>();
        norm += a.square().sum().item<double>();
      }
    }
    return norm == 0 ? 0 : std::sqrt(difference / norm);
  }

  /// Of inputs, above which no Jacobian is taken.
  static constexpr int64_t kMostValues = 512;

  Invertible& block_;
  const InputShapes& shapes_;
  const IsInvertibleOptions& options_;
  InvertibilityReport report_;
  bool has_log_det_ = false;
};

/// A pointer to the module, from a holder or from a pointer.
template <class M>
auto pointer_to(const std::shared_ptr<M>& module) {
  return module;
}
template <class Holder>
auto pointer_to(const Holder& holder) {
  static_assert(
      torch::detail::is_module_holder<Holder>::value,
      "memcnn: check_invertible_module() takes a module holder, as "
      "TORCH_MODULE makes it, or a std::shared_ptr of a module.");
  return holder.ptr();
}

} // namespace detail

/// Checks on random input that a module's inverse undoes its forward and the
/// other way round, how far gradients at the rebuilt input are off, and whether
/// log-determinants are those of the Jacobian.
///
/// module is a holder or std::shared_ptr of any module. Parameters, buffers,
/// gradients, train or eval mode and the default generators are left as found.
///
/// Shapes:   shapes are those of the inputs of forward: {2, 64, 8, 8}, or
///           {{2, 32}, {2, 32}} for two inputs. Inputs are normally
///           distributed, in dtype and on device of the first parameter
///           (float32 on the CPU where there is none).
/// Throws:   nothing on account of the module: a module that lacks inverse(),
///           or throws, is not invertible, and the report says why.
/// Source:   Python MemCNN 1.5.2, is_invertible_module. Differs: any number of
///           inputs, a report, and nothing is changed.
/// Example:
///   auto report = memcnn::check_invertible_module(coupling, {2, 64, 8, 8});
///   if (!report.invertible) std::cerr << report.reason << "\n";
template <class Module>
InvertibilityReport check_invertible_module(
    const Module& module,
    const InputShapes& shapes,
    const IsInvertibleOptions& options = {}) {
  const auto pointer = detail::pointer_to(module);
  using M = std::decay_t<decltype(*pointer)>;
  if constexpr (detail::has_forward_v<M> && detail::has_inverse_v<M>) {
    const std::shared_ptr<Invertible> block = detail::checked_map(pointer);
    return detail::InvertibilityCheck(*block, shapes, options).run();
  } else {
    InvertibilityReport report;
    report.reason = "'" + pointer->name() +
        "' has no member inverse (or forward) that is neither overloaded nor a "
        "template";
    return report;
  }
}

/// Whether a module's inverse undoes its forward and the other way round:
/// check_invertible_module() without the details.
///
/// Example:
///   bool ok = memcnn::is_invertible_module(coupling, {2, 64, 8, 8});
template <class Module>
bool is_invertible_module(
    const Module& module,
    const InputShapes& shapes,
    const IsInvertibleOptions& options = {}) {
  return check_invertible_module(module, shapes, options).invertible;
}

} // namespace memcnn

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/coupling/options.h>
#include <memcnn/coupling/unchanged.h>
#include <memcnn/detail/branch.h>
#include <memcnn/detail/check_branch.h>
#include <memcnn/detail/fixed_point.h>
#include <memcnn/detail/halves.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/layout.h>
#include <memcnn/detail/local_run.h>
#include <memcnn/detail/log_det_asked.h>
#include <memcnn/detail/ownership.h>
#include <memcnn/detail/tensor_map.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/nn/cloneable.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>

namespace memcnn::detail {

/// The module behind every coupling: two halves, of which each is updated in
/// turn by a law whose parameter is a branch's value at the other half.
///
///   forward:  half 0 by F(half 1), then half 1 by G(half 0)
///   inverse:  half 1 undone by G(half 0), then half 0 undone by F(half 1)
///
/// So half i is always updated by branch i, and a direction is an order of the
/// two updates, of which one is left out where its branch is Unchanged. Branches
/// take the half and then conditions. A Law is a struct of static members:
///   kName                                 the coupling's name
///   kCanBeExact                           whether rounded values can be undone
///   kLogDet                               kZero or kSample
///   Value                                 what a branch returns
///   kApplied                              how many of a value's tensors, the
///                                         first ones, update the half
///   apply(direction, half, value)         the half, updated or undone
///   apply_in_place(...)                   likewise, in the half's memory
///   tensors(value), map(value, fn)        a value's tensors; a value of what fn
///                                         makes of each of them
///   log_slope(value)                      log |dy/dx| of an update in forward,
///                                         for each entry (kSample only)
///   pull_back(direction, x, value, grad, grad_log_det)
///                                         turns grad, that of the updated half,
///                                         into that of the half before, and
///                                         returns those of the value's tensors
///
/// To read next: detail/chain.h, which runs one coupling after another, and
/// detail/node.h, which calls backward_step().
template <class F, class G, class Law>
class CouplingImpl final : public torch::nn::Cloneable<CouplingImpl<F, G, Law>>,
                           public TensorMap {
  using Value = typename Law::Value;

 public:
  CouplingImpl(F f_, G g_, const CouplingOptions& options = {})
      : f(std::move(f_)),
        g(std::move(g_)),
        options_(options),
        exact_(Law::kName, Law::kCanBeExact, options.fractional_bits()) {
    give_split_dim(Law::kName, module_of(f), "F", options.split_dim());
    give_split_dim(Law::kName, module_of(g), "G", options.split_dim());
    reset();
  }

  /// G is a deep copy of F.
  explicit CouplingImpl(F f_, const CouplingOptions& options = {})
      : CouplingImpl(f_, detail::clone(f_), options) {}

  /// Children are named as in Python MemCNN, so that keys of saved states are
  /// the same.
  void reset() override {
    this->register_module("Fm", f.ptr());
    // One module as both branches is one child: registered twice, its
    // parameters would be listed, and stepped by an optimiser, twice.
    if (module_of(g) != module_of(f)) {
      this->register_module("Gm", g.ptr());
    }
  }

  at::Tensor forward(const at::Tensor& input) {
    return TensorMap::forward(input); // AnyModule wants it of this class
  }

  /// As they were given; fixed since then.
  const CouplingOptions& options() const {
    return options_;
  }

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<c10::Device>& device = std::nullopt) const override {
    F f_copy = detail::clone(f, device);
    G g_copy = clone_beside(f, f_copy, g, device);
    auto copy = std::make_shared<CouplingImpl>(
        std::move(f_copy), std::move(g_copy), options_);
    copy_modes(*this, *copy);
    return copy;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::" << Law::kName << "(split_dim=" << options_.split_dim();
    if (options_.fractional_bits()) {
      stream << ", fractional_bits=" << *options_.fractional_bits();
    }
    stream << ")";
  }

  F f;
  G g;

 private:
  // What the machinery asks of an Invertible; for users there are forward(),
  // inverse(), and those of given().

  Tensors run_with(
      Direction direction,
      Tensors inputs,
      const RunExtras& extras,
      Recording& recording) override {
    check_extras(direction, extras);
    check_samples(direction, inputs, extras);
    const bool whole = inputs.size() == 1;
    Halves halves = take_halves(direction, inputs);
    exact_.report(name_of(direction), halves[0]);
    for (at::Tensor& half : halves) {
      half = exact_.round(half);
      exact_.check_range(name_of(direction), half);
    }
    const LogDetAsked asked(extras.log_det != nullptr);
    for (const size_t i : order(direction)) {
      if (!kUpdates[i]) {
        continue;
      }
      const auto at_half = [&](const at::Tensor& argument) {
        return branch_value(
            direction,
            i,
            joined({argument}, extras.conditions),
            halves[i],
            recording);
      };
      const Value value = exact_.round(
          Law::map(
              exact_.first_run(halves[1 - i], recording, at_half),
              [&](const auto& part) { return beside(halves[i], part); }),
          halves[i]);
      if (!is_graph_built(halves[i], value) && is_sole_owner(halves[i])) {
        Law::apply_in_place(direction, halves[i], value);
      } else {
        halves[i] =
            laid_out_as(halves[i], Law::apply(direction, halves[i], value));
      }
      exact_.check_range(name_of(direction), halves[i]);
      add_log_det(direction, value, extras.log_det);
    }
    return joined_if(whole, std::move(halves));
  }

  LogDet log_det() const override {
    return Law::kLogDet;
  }

  std::optional<size_t> condition_count() const override {
    return condition_count_of<F, G>();
  }

  std::optional<int64_t> takes_halves_of() const override {
    return options_.split_dim();
  }

  bool takes_halves_along(int64_t /*dim*/) const override {
    return false; // of its split_dim alone
  }

  /// The fused step: each branch runs once, with a graph, and its value both
  /// undoes the update and carries the gradient; only one branch's activations
  /// live at a time. Memory that is ours alone becomes the result's.
  BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) override {
    if (after.kept_inputs[0].defined()) { // nothing is to be undone
      return Invertible::backward_step(
          direction, std::move(after), recording, parameters);
    }
    if (none_defined(after.grad_outputs) && !after.grad_log_det.defined()) {
      return only_rebuilt(direction, after, recording);
    }
    const LogDetAsked asked(after.grad_log_det.defined());
    const bool whole = after.outputs.size() == 1;
    Halves halves = take_halves(direction, after.outputs);
    Halves grads;
    if (!whole || after.grad_outputs[0].defined()) {
      grads = take_halves(direction, after.grad_outputs);
    }
    for (size_t i = 0; i < 2; ++i) {
      halves[i] = owned(std::move(halves[i]));
      grads[i] = grads[i].defined() ? owned_as(halves[i], std::move(grads[i]))
                                    : at::zeros_like(halves[i]);
    }
    const bool needs_input_grad =
        after.needs_grad[0] || after.needs_grad.back();

    Undoing undoing{
        direction,
        std::move(halves),
        std::move(grads),
        after,
        Tensors(after.conditions.size()),
        recording,
        parameters};
    const auto [first, last] = order(direction);
    undo_update(
        undoing, last, /*needs_grad=*/needs_input_grad || kUpdates[first]);
    undo_update(undoing, first, needs_input_grad);

    BeforeRun before;
    before.grad_conditions = std::move(undoing.grad_conditions);
    before.inputs = joined_if(whole, std::move(undoing.halves));
    before.grad_inputs = needs_input_grad
        ? joined_if(whole, std::move(undoing.grads))
        : Tensors(before.inputs.size());
    return before;
  }

  /// Where a pass only goes through, to what log-determinants before depend on.
  BeforeRun only_rebuilt(
      Direction direction,
      const AfterRun& after,
      Recording& recording) {
    BeforeRun before;
    before.inputs = rebuild(direction, after, recording);
    before.grad_inputs.resize(before.inputs.size());
    before.grad_conditions.resize(after.conditions.size());
    return before;
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return Law::kName;
  }

  /// Whether half i is updated.
  static constexpr std::array<bool, 2> kUpdates = {
      !is_unchanged_v<F>,
      !is_unchanged_v<G>};

  static std::array<size_t, 2> order(Direction direction) {
    return direction == Direction::kForward ? std::array<size_t, 2>{0, 1}
                                            : std::array<size_t, 2>{1, 0};
  }

  /// Whether an update of the half becomes part of a graph.
  static bool is_graph_built(const at::Tensor& half, const Value& value) {
    if (!at::GradMode::is_enabled()) {
      return false;
    }
    const Tensors parts = Law::tensors(value);
    return half.requires_grad() ||
        std::any_of(parts.begin(), parts.end(), [](const auto& part) {
             return part.requires_grad();
           });
  }

  /// The halves, given away: a whole tensor is taken apart, and let go.
  Halves take_halves(Direction direction, Tensors& tensors) const {
    if (tensors.size() == 2) {
      return {std::move(tensors[0]), std::move(tensors[1])};
    }
    const at::Tensor whole = std::exchange(tensors[0], at::Tensor());
    return split_halves(
        place_of(Law::kName, direction), whole, options_.split_dim());
  }

  /// The halves in the form in which they came.
  Tensors joined_if(bool whole, Halves halves) const {
    if (whole) {
      return {at::cat({halves[0], halves[1]}, options_.split_dim())};
    }
    return {std::move(halves[0]), std::move(halves[1])};
  }

  /// Stops where samples are no dimension of their own.
  void check_samples(
      Direction direction,
      const Tensors& inputs,
      const RunExtras& extras) const {
    const int64_t dim = options_.split_dim();
    TORCH_CHECK_VALUE(
        extras.log_det == nullptr || (dim != 0 && dim != -inputs[0].dim()),
        Law::kName,
        "::",
        name_of(direction),
        "_with_log_det(): expected a split_dim other than the samples', 0, but "
        "got ",
        dim,
        " (input ",
        describe(inputs[0]),
        "). Split the channels, or add a dimension with unsqueeze(0).");
  }

  /// Adds the log-determinant of an update.
  static void
  add_log_det(Direction direction, const Value& value, LogDetSum* sum) {
    if constexpr (Law::kLogDet == LogDet::kSample) {
      if (sum != nullptr) {
        sum->add(
            Law::log_slope(value).flatten(1).sum(1),
            direction == Direction::kForward ? 1 : -1);
      }
    }
  }

  /// Calls fn with the holder of branch i.
  template <class Fn>
  auto with_branch(size_t i, Fn&& fn) {
    return i == 0 ? fn(f) : fn(g);
  }

  /// The value of branch i at one half and the conditions, checked against the
  /// other half, which it is to update.
  Value branch_value(
      Direction direction,
      size_t i,
      const Tensors& arguments,
      const at::Tensor& updated,
      Recording& recording) {
    const BranchCall where{
        Law::kName, direction, i, options_.split_dim(), arguments[0]};
    Value value = where.run([&] {
      return with_branch(i, [&](auto& branch) {
        return recording.run(
            i, *module_of(branch), arguments, [&](const Tensors& again) {
              return call_branch<Value>(branch, again);
            });
      });
    });
    const Tensors parts = Law::tensors(value);
    for (size_t k = 0; k < parts.size(); ++k) {
      where.check_sizes(parts[k], updated);
      if (k < Law::kApplied) {
        where.check_dtype(parts[k], updated);
      }
    }
    return value;
  }

  /// What a backward step works on: halves and their gradients, which go from
  /// after the run to before it in their own memory, one update after another.
  struct Undoing {
    Direction direction;
    Halves halves;
    Halves grads;
    const AfterRun& after; // its conditions, and what is wanted
    Tensors grad_conditions;
    Recording& recording;
    ParameterGradients& parameters;
  };

  /// Undoes update i, with a gradient for the other half if that is wanted.
  ///
  /// Source: Gomez et al. 2017, algorithm 1; each branch runs once, where that
  /// runs it twice.
  void undo_update(Undoing& undoing, size_t i, bool needs_grad) {
    if (!kUpdates[i]) {
      return;
    }
    const Recording::ReplayScope scope(undoing.recording);
    const std::vector<bool> wanted =
        joined({needs_grad}, undoing.after.needs_condition_grad);
    LocalRun branch(
        *with_branch(i, [](auto& holder) { return module_of(holder); }),
        cut_off(
            joined({undoing.halves[1 - i]}, undoing.after.conditions), wanted),
        wanted,
        undoing.parameters);
    // (1) The branch runs again at the other half, with a graph.
    Value value = run_again(undoing, i, branch);
    // (2) Its value takes the half back, and (3) the law takes the half's
    // gradient to before the update, and to the value.
    Tensors value_grads = take_back(undoing, i, std::move(value));
    // (4) The branch takes it to its parameters and to the other half.
    Tensors grads = branch.gradients(std::move(value_grads));
    Tensors of_conditions = split_off(grads, undoing.after.conditions.size());
    for (size_t k = 0; k < of_conditions.size(); ++k) {
      add_gradient(undoing.grad_conditions[k], std::move(of_conditions[k]));
    }
    if (grads[0].defined()) {
      undoing.grads[1 - i].add_(grads[0]);
    }
  }

  Value run_again(const Undoing& undoing, size_t i, LocalRun& branch) {
    const at::AutoGradMode with_graph(branch.needs_graph());
    Value value = branch_value(
        undoing.direction,
        i,
        branch.arguments,
        undoing.halves[i],
        undoing.recording);
    branch.outputs = Law::tensors(value);
    return value;
  }

  /// Takes half i and its gradient from after an update by `value` to before
  /// it, and returns the gradients of the value's tensors.
  Tensors take_back(Undoing& undoing, size_t i, Value value) {
    const at::Tensor& half = undoing.halves[i];
    const Value constant = exact_.round(
        Law::map(value, [](const auto& part) { return detached(part); }), half);
    // The gradient of y = law(x, value) is a matter of x: what was there before
    // an update in forward, and what is there after one in inverse.
    if (undoing.direction == Direction::kForward) {
      Law::apply_in_place(Direction::kInverse, half, constant);
    }
    Tensors grads = Law::pull_back(
        undoing.direction,
        half,
        constant,
        undoing.grads[i],
        undoing.after.grad_log_det);
    if (undoing.direction == Direction::kInverse) {
      Law::apply_in_place(Direction::kForward, half, constant);
    }
    return laid_out_as(Law::tensors(value), std::move(grads));
  }

  CouplingOptions options_;
  ExactMode exact_;
};

/// The coupling of two branches. What they are is asked here, before the module
/// that holds them is looked at, so that a mistake is the first thing that a
/// compiler names.
template <class F, class G, class Law>
struct coupling_of {
  static_assert(
      is_holder_v<F> && is_holder_v<G>,
      "memcnn: a coupling takes F and G, or F alone, and then its "
      "CouplingOptions; F and G are module holders (as TORCH_MODULE makes "
      "them), torch::nn::Sequential or torch::nn::AnyModule, not the Impl.");
  static_assert(
      (is_unchanged_v<F> || may_return<F, typename Law::Value>()) &&
          (is_unchanged_v<G> || may_return<G, typename Law::Value>()),
      "memcnn: F and G take one Tensor, and then conditions; those of an "
      "AdditiveCoupling return one, those of an AffineCoupling a "
      "memcnn::ScaleShift, as AffineAdapterSigmoid makes it of a module.");
  static_assert(
      !is_unchanged_v<F> || !is_unchanged_v<G>,
      "memcnn: a coupling of two memcnn::Unchanged does nothing.");
  using type = CouplingImpl<F, G, Law>;
};

} // namespace memcnn::detail

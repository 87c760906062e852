// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/coupling/adapters.h>
#include <memcnn/coupling/options.h>
#include <memcnn/detail/dense.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/fixed_point.h>
#include <memcnn/detail/freed_storage.h>
#include <memcnn/detail/gradient.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/recording.h>
#include <memcnn/invertible.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/nn/cloneable.h>

#include <array>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace memcnn::detail {

using Halves = std::array<at::Tensor, 2>;

/// Splits a tensor in two dense ones along a dimension, in the given memory
/// format or, without one, in its own. The first half is the larger one where
/// the size is odd, as in torch::chunk. `place` begins an error.
inline Halves split_halves(
    const std::string& place,
    const at::Tensor& input,
    int64_t dim,
    std::optional<at::MemoryFormat> format = std::nullopt) {
  TORCH_CHECK_VALUE(
      input.defined(),
      place,
      "expected a tensor, but got an undefined one. Pass a tensor of "
      "floating point values.");
  TORCH_CHECK_TYPE(
      input.is_floating_point(),
      place,
      "expected a tensor of floating point values, but got ",
      describe(input),
      ". Convert it with to(torch::kFloat).");
  const int64_t dims = input.dim();
  TORCH_CHECK_VALUE(
      -dims <= dim && dim < dims,
      place,
      "expected an input with a dim ",
      dim,
      " to split, but got ",
      describe(input),
      ". Add a dimension, or set CouplingOptions().split_dim().");
  const int64_t size = input.size(dim);
  TORCH_CHECK_VALUE(
      size >= 2,
      place,
      "expected at least 2 entries in dim ",
      dim,
      " to split into two halves, but got ",
      size,
      " (input sizes ",
      input.sizes(),
      "). Give more channels, or set CouplingOptions().split_dim().");
  // What made the input runs the same kernels in backward as where the gradient
  // comes from backward_step().
  const at::Tensor whole = with_dense_gradient(input);
  const int64_t first = (size + 1) / 2;
  const auto half = [&](int64_t start, int64_t length) {
    const at::Tensor view = whole.narrow(dim, start, length);
    return format ? view.contiguous(*format) : dense(view);
  };
  return {half(0, first), half(first, size - first)};
}

/// The module behind every coupling: two halves, of which each is updated in
/// turn by a law whose parameter is a branch's value at the other half.
///
///   forward:  half 0 by F(half 1), then half 1 by G(half 0)
///   inverse:  half 1 undone by G(half 0), then half 0 undone by F(half 1)
///
/// So half i is always updated by branch i, and a direction is an order of the
/// two updates. A Law is a struct of static members:
///   kName                                the coupling's name
///   kCanBeExact                          whether rounded values can be undone
///   Value                                what a branch returns
///   apply(direction, half, value)        the half, updated or undone
///   apply_in_place(...)                  likewise, in the half's memory
///   tensors(value), detach(value)        a value's tensors; without a graph
///   gradient(direction, x, value, grad)  gradients of an update: returns those
///                                        of the value's tensors, turns grad
///                                        into that of the half before
template <class F, class G, class Law>
class CouplingImpl final : public torch::nn::Cloneable<CouplingImpl<F, G, Law>>,
                           public Invertible {
  static_assert(
      is_holder_v<F> && is_holder_v<G>,
      "memcnn: a coupling takes module holders (as TORCH_MODULE makes them), "
      "torch::nn::Sequential or torch::nn::AnyModule for F and G.");

  using Value = typename Law::Value;

 public:
  CouplingImpl(F f_, G g_, CouplingOptions options_ = {})
      : options(options_), f(std::move(f_)), g(std::move(g_)) {
    check_adapter(*module_of(f), "F");
    check_adapter(*module_of(g), "G");
    if (options.fractional_bits()) {
      TORCH_CHECK_VALUE(
          Law::kCanBeExact,
          Law::kName,
          "::",
          Law::kName,
          "(): expected no fractional_bits, since a product is rounded and "
          "cannot be undone exactly, but got ",
          *options.fractional_bits(),
          ". Use AdditiveCoupling for an exact mode.");
      TORCH_CHECK_VALUE(
          *options.fractional_bits() >= 0 && *options.fractional_bits() < 53,
          Law::kName,
          "::",
          Law::kName,
          "(): expected fractional_bits from 0 to 52, but got ",
          *options.fractional_bits(),
          ". 12 to 16 suit float32.");
      fixed_point_.emplace(*options.fractional_bits());
    }
    reset();
  }

  /// G is a deep copy of F.
  explicit CouplingImpl(F f_, CouplingOptions options_ = {})
      : CouplingImpl(f_, detail::clone(f_), options_) {}

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
    Recording off = Recording::off();
    return run(Direction::kForward, {input}, off)[0];
  }

  at::Tensor inverse(const at::Tensor& output) {
    Recording off = Recording::off();
    return run(Direction::kInverse, {output}, off)[0];
  }

  std::vector<at::Tensor> run(
      Direction direction,
      std::vector<at::Tensor> inputs,
      Recording& recording) override {
    const bool whole = inputs.size() == 1;
    Halves halves = take_halves(direction, inputs);
    if (fixed_point_) {
      for (at::Tensor& half : halves) {
        half = fixed_point_->round(half);
        fixed_point_->check_range(place(direction), half);
      }
    }
    for (const size_t i : order(direction)) {
      const Value value = settled(
          branch_value(direction, i, halves[1 - i], halves[i], recording),
          halves[i]);
      if (!at::GradMode::is_enabled() && is_sole_owner(halves[i])) {
        Law::apply_in_place(direction, halves[i], value);
      } else {
        halves[i] = Law::apply(direction, halves[i], value);
      }
      if (fixed_point_) {
        fixed_point_->check_range(place(direction), halves[i]);
      }
    }
    return given_back(std::move(halves), whole);
  }

  std::optional<int64_t> takes_halves_of() const override {
    return options.split_dim();
  }

  /// The fused step: each branch runs once, with a graph, and its value both
  /// undoes the update and carries the gradient; only one branch's activations
  /// live at a time. Memory that is ours alone becomes the result's.
  BackwardOutput backward_step(
      Direction direction,
      BackwardInput given,
      Recording& recording,
      ParameterGradients& parameters) override {
    if (given.kept_inputs[0].defined()) {
      return Invertible::backward_step(
          direction, std::move(given), recording, parameters);
    }
    const bool whole = given.outputs.size() == 1;
    Halves halves = take_halves(direction, given.outputs);
    Halves grads;
    if (!whole || given.grad_outputs[0].defined()) {
      grads = take_halves(direction, given.grad_outputs);
    }
    for (const size_t i : {0, 1}) {
      halves[i] = owned(std::move(halves[i]));
      grads[i] = grads[i].defined() ? owned_as(halves[i], std::move(grads[i]))
                                    : at::zeros_like(halves[i]);
    }
    const bool needs_input_grad =
        given.needs_grad[0] || given.needs_grad.back();

    const auto updates = order(direction);
    for (auto it = updates.rbegin(); it != updates.rend(); ++it) {
      // The last gradient is that of the input alone.
      const bool needs_grad = it + 1 != updates.rend() || needs_input_grad;
      undo_update(
          direction, *it, halves, grads, needs_grad, recording, parameters);
    }
    BackwardOutput before;
    before.inputs = given_back(std::move(halves), whole);
    before.grad_inputs = needs_input_grad
        ? given_back(std::move(grads), whole)
        : std::vector<at::Tensor>(before.inputs.size());
    return before;
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return Law::kName;
  }

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<c10::Device>& device = std::nullopt) const override {
    F f_copy = detail::clone(f, device);
    std::shared_ptr<CouplingImpl> copy;
    if constexpr (std::is_same_v<F, G>) {
      copy = std::make_shared<CouplingImpl>(
          f_copy,
          module_of(g) == module_of(f) ? f_copy : detail::clone(g, device),
          options);
    } else {
      copy = std::make_shared<CouplingImpl>(
          std::move(f_copy), detail::clone(g, device), options);
    }
    copy_modes(*this, *copy);
    return copy;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::" << Law::kName << "(split_dim=" << options.split_dim();
    if (options.fractional_bits()) {
      stream << ", fractional_bits=" << *options.fractional_bits();
    }
    stream << ")";
  }

  CouplingOptions options;
  F f;
  G g;

 private:
  static std::array<size_t, 2> order(Direction direction) {
    return direction == Direction::kForward ? std::array<size_t, 2>{0, 1}
                                            : std::array<size_t, 2>{1, 0};
  }

  static const char* branch_name(size_t i) {
    return i == 0 ? "F" : "G";
  }

  /// The halves, given away: a whole tensor is taken apart, and let go.
  Halves take_halves(Direction direction, std::vector<at::Tensor>& tensors)
      const {
    if (tensors.size() == 2) {
      return {std::move(tensors[0]), std::move(tensors[1])};
    }
    const at::Tensor whole = std::exchange(tensors[0], at::Tensor());
    return split_halves(place(direction), whole, options.split_dim());
  }

  /// The halves in the form in which they came.
  std::vector<at::Tensor> given_back(Halves halves, bool whole) const {
    if (whole) {
      return {at::cat({halves[0], halves[1]}, options.split_dim())};
    }
    return {std::move(halves[0]), std::move(halves[1])};
  }

  /// The tensor, or a copy of it where others would see it change.
  static at::Tensor owned(at::Tensor tensor) {
    return is_sole_owner(tensor) ? std::move(tensor) : tensor.clone();
  }

  /// Likewise, in the memory layout of `like`. A loss often returns gradients
  /// in another one, which every kernel of every block would convert again.
  static at::Tensor owned_as(const at::Tensor& like, at::Tensor tensor) {
    return is_sole_owner(tensor) && tensor.strides() == like.strides()
        ? std::move(tensor)
        : at::empty_like(like).copy_(tensor);
  }

  static std::string place(Direction direction) {
    return std::string(Law::kName) + "::" + name_of(direction) + "(): ";
  }

  void check_adapter(const torch::nn::Module& branch, const char* name) const {
    const auto* adapter = dynamic_cast<const SplitsChannels*>(&branch);
    TORCH_CHECK_VALUE(
        adapter == nullptr || adapter->split_dim() == options.split_dim(),
        Law::kName,
        "::",
        Law::kName,
        "(): expected the adapter ",
        name,
        " to have the coupling's split_dim, but got ",
        adapter == nullptr ? 0 : adapter->split_dim(),
        " (coupling ",
        options.split_dim(),
        "). Give both the same CouplingOptions.");
  }

  /// Calls fn with the holder of branch i.
  template <class Fn>
  auto with_branch(size_t i, Fn&& fn) {
    return i == 0 ? fn(f) : fn(g);
  }

  /// The value of branch i at one half, checked against the other half, which
  /// it is to update.
  Value branch_value(
      Direction direction,
      size_t i,
      const at::Tensor& argument,
      const at::Tensor& updated,
      Recording& recording) {
    // Inference tensors have no version, and no graph that a change could hurt.
    const auto version = [&] {
      return argument.is_inference() ? 0 : argument._version();
    };
    const auto version_before = version();
    const auto compute = [&](auto& branch) {
      return recording.run(i, *module_of(branch), {argument}, [&] {
        return call<Value>(branch, argument);
      });
    };
    Value value = [&] {
      try {
        return with_branch(i, compute);
      } catch (c10::Error& error) {
        error.add_context(c10::str(
            "in ",
            branch_name(i),
            " of ",
            place(direction),
            "argument ",
            describe(argument),
            ", split_dim ",
            options.split_dim()));
        throw;
      }
    }();
    TORCH_CHECK(
        version() == version_before,
        place(direction),
        "expected ",
        branch_name(i),
        " to leave its argument as it is, but got a change in place (argument ",
        describe(argument),
        "). Let it begin with an operation that is not in place.");
    for (const at::Tensor& part : Law::tensors(value)) {
      TORCH_CHECK_VALUE(
          part.defined() && part.sizes() == updated.sizes(),
          place(direction),
          "expected ",
          branch_name(i),
          " to return the sizes ",
          updated.sizes(),
          " of the half that it updates, but got ",
          describe(part),
          " for an argument of sizes ",
          argument.sizes(),
          " (split_dim ",
          options.split_dim(),
          "). Give an even size in that dim, or a branch that maps one half to "
          "the sizes of the other.");
      TORCH_CHECK_TYPE(
          at::result_type(updated, part) == updated.scalar_type(),
          place(direction),
          "expected ",
          branch_name(i),
          " to return no wider dtype than its input's ",
          updated.scalar_type(),
          ", but got ",
          part.scalar_type(),
          " (argument ",
          describe(argument),
          "). Convert the input, or the branch's result with to().");
    }
    return value;
  }

  /// What a half is updated with: in the exact mode the rounded value.
  Value settled(Value value, const at::Tensor& updated) const {
    if constexpr (Law::kCanBeExact) {
      if (fixed_point_) {
        return fixed_point_->round(value.to(updated.scalar_type()));
      }
    }
    return value;
  }

  /// Undoes update i in the memory of `halves` and takes `grads` from after it
  /// to before it.
  void undo_update(
      Direction direction,
      size_t i,
      const Halves& halves,
      const Halves& grads,
      bool needs_grad,
      Recording& recording,
      ParameterGradients& parameters) {
    at::Tensor argument = halves[1 - i].detach();
    if (fixed_point_) {
      argument = dense(argument); // as in forward, for the same kernels
    }
    Tensors arguments;
    if (needs_grad) {
      arguments.push_back(argument.requires_grad_());
    }
    torch::nn::Module& branch =
        *with_branch(i, [](auto& holder) { return module_of(holder); });
    const Tensors wanted = parameters.wanted(branch);

    const Recording::ReplayScope scope(recording);
    Tensors values;
    Tensors value_grads;
    {
      const Value value = [&] {
        const at::AutoGradMode with_graph(needs_grad || !wanted.empty());
        return branch_value(direction, i, argument, halves[i], recording);
      }();
      values = Law::tensors(value);
      check_reaches_only(values, arguments, branch);
      const Value constant = settled(Law::detach(value), halves[i]);
      // A gradient of y = law(x, value) is a matter of x: what was there before
      // a forward update, what is there after an inverse one.
      if (direction == Direction::kForward) {
        Law::apply_in_place(Direction::kInverse, halves[i], constant);
      }
      value_grads = Law::gradient(direction, halves[i], constant, grads[i]);
      if (fixed_point_) {
        for (size_t k = 0; k < value_grads.size(); ++k) {
          value_grads[k] =
              value_grads[k].contiguous(values[k].suggest_memory_format());
        }
      }
      if (direction == Direction::kInverse) {
        Law::apply_in_place(Direction::kForward, halves[i], constant);
      }
    }
    Tensors gradients = local_gradient(
        std::move(values), std::move(value_grads), arguments, wanted);
    auto next = gradients.begin();
    if (needs_grad && (*next).defined()) {
      grads[1 - i].add_(*next);
    }
    next += static_cast<std::ptrdiff_t>(arguments.size());
    for (const at::Tensor& parameter : wanted) {
      parameters.add(parameter, std::move(*next++));
    }
  }

  std::optional<FixedPoint> fixed_point_;
};

} // namespace memcnn::detail

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>
#include <memcnn/detail/signature.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace memcnn::detail {

template <class Signature>
struct with_arguments;
template <class R, class... Args>
struct with_arguments<R(Args...)> {
  using type = WithLogDet(Args...);
};
/// The signature of a map _with_log_det: that of the map, with another result.
template <class Signature>
using WithArguments = typename with_arguments<Signature>::type;

/// Makes any module with forward and inverse an Invertible, with the default
/// backward step: the module as a whole is its one branch. It has conditions
/// where both maps take more tensors than the other returns, and a
/// log-determinant where it has both maps _with_log_det, or PreservesVolume.
template <class M>
class PlainModule final : public Invertible {
  using Forward = typename forward_signature<M>::type;
  using Inverse = typename inverse_signature<M>::type;

 public:
  explicit PlainModule(std::shared_ptr<M> module)
      : module_(std::move(module)) {}

  Tensors run(Direction direction, Tensors inputs, Recording& recording)
      override {
    return run_with(direction, std::move(inputs), RunExtras(), recording);
  }

  Tensors run_with(
      Direction direction,
      Tensors inputs,
      const RunExtras& extras,
      Recording& recording) override {
    check_extras(direction, extras);
    const bool with_log_det = has_log_det_v<M> && extras.log_det != nullptr;
    Tensors outputs = recording.run_map(
        direction == Direction::kForward ? 0 : 1,
        *module_,
        joined(std::move(inputs), extras.conditions),
        [&](const Tensors& arguments) {
          return with_log_det ? call_with_log_det(direction, arguments)
                              : call(direction, arguments);
        });
    if (with_log_det) {
      extras.log_det->add(split_off(outputs, 1)[0]);
    }
    return outputs;
  }

  LogDet log_det() const override {
    return has_log_det_v<M>                     ? LogDet::kSample
        : std::is_base_of_v<PreservesVolume, M> ? LogDet::kZero
                                                : LogDet::kUnknown;
  }

  std::optional<size_t> condition_count() const override {
    return static_cast<size_t>(conditions_in_v<Forward, Inverse>);
  }

  torch::nn::Module& module() override {
    return *module_;
  }

  std::string type_name() const override {
    return module_->name();
  }

 private:
  Tensors call(Direction direction, const Tensors& arguments) {
    return direction == Direction::kForward
        ? call_spread<Forward>(
              [&](const auto&... each) { return module_->forward(each...); },
              arguments,
              direction)
        : call_spread<Inverse>(
              [&](const auto&... each) { return module_->inverse(each...); },
              arguments,
              direction);
  }

  template <class Signature, class Fn>
  Tensors call_spread(const Fn& fn, const Tensors& inputs, Direction direction)
      const {
    constexpr std::ptrdiff_t kCount = Spread<Signature>::count();
    TORCH_CHECK_VALUE(
        kCount < 0 || static_cast<std::ptrdiff_t>(inputs.size()) == kCount,
        type_name(),
        "::",
        name_of(direction),
        "(): expected ",
        kCount,
        " tensors, but got ",
        inputs.size(),
        ". Let forward() and inverse() take what the other returns.");
    return pack(Spread<Signature>::call(fn, inputs));
  }

  /// The output, and the log-determinant after it.
  Tensors call_with_log_det(Direction direction, const Tensors& arguments) {
    if constexpr (has_log_det_v<M>) {
      const WithLogDet result = direction == Direction::kForward
          ? Spread<WithArguments<Forward>>::call(
                [&](const auto&... each) -> WithLogDet {
                  return module_->forward_with_log_det(each...);
                },
                arguments)
          : Spread<WithArguments<Inverse>>::call(
                [&](const auto&... each) -> WithLogDet {
                  return module_->inverse_with_log_det(each...);
                },
                arguments);
      check_log_det(direction, result, arguments[0]);
      return {result.output, result.log_det};
    }
    return {};
  }

  void check_log_det(
      Direction direction,
      const WithLogDet& result,
      const at::Tensor& input) const {
    const at::Tensor& log_det = result.log_det;
    TORCH_CHECK_VALUE(
        log_det.defined() &&
            (log_det.dim() == 0 ||
             (log_det.dim() == 1 && log_det.size(0) == input.size(0))),
        type_name(),
        "::",
        name_of(direction),
        "_with_log_det(): expected a log-determinant for each of the ",
        input.size(0),
        " samples, or one for all, but got ",
        describe(log_det),
        ". Sum over all dimensions but the first.");
  }

  std::shared_ptr<M> module_;
};

/// Whether a module stands for an Invertible that it holds, as a wrapper does.
template <class M, class = void>
inline constexpr bool stands_for_invertible_v = false;
template <class M>
inline constexpr bool stands_for_invertible_v<
    M,
    std::void_t<decltype(std::declval<const M&>().invertible())>> =
    std::is_same_v<
        std::decay_t<decltype(std::declval<const M&>().invertible())>,
        std::shared_ptr<Invertible>>;

/// The Invertible of a held module: itself where it is one, or what it stands
/// for.
template <class M>
std::shared_ptr<Invertible> as_invertible(const std::shared_ptr<M>& module) {
  if constexpr (std::is_base_of_v<Invertible, M>) {
    return module;
  } else if constexpr (stands_for_invertible_v<M>) {
    return module != nullptr ? module->invertible() : nullptr;
  } else {
    return std::make_shared<PlainModule<M>>(module);
  }
}

} // namespace memcnn::detail

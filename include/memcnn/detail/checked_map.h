// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/plain_module.h>
#include <memcnn/detail/signature.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/flow/multi_scale.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/recording.h>
#include <memcnn/wrapper.h>

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>

namespace memcnn::detail {

/// A front end as an Invertible, run by what its given() returns: as its users
/// run it, with nodes of its own.
template <class M>
class FrontEndMap final : public Invertible {
 public:
  FrontEndMap(std::shared_ptr<M> module, LogDet log_det)
      : module_(std::move(module)), log_det_(log_det) {}

  Tensors run(Direction direction, Tensors inputs, Recording& recording)
      override {
    return run_with(direction, std::move(inputs), RunExtras(), recording);
  }

  Tensors run_with(
      Direction direction,
      Tensors inputs,
      const RunExtras& extras,
      Recording& /*recording*/) override {
    check_extras(direction, extras);
    const auto given = module_->given(extras.conditions.vec());
    if (direction == Direction::kForward) {
      return extras.log_det == nullptr
          ? pack(given.forward(inputs[0]))
          : taken(given.forward_with_log_det(inputs[0]), extras);
    }
    using Outputs = decltype(given.forward(inputs[0]));
    const auto outputs = unpack<Outputs>(inputs);
    return extras.log_det == nullptr
        ? pack(given.inverse(outputs))
        : taken(given.inverse_with_log_det(outputs), extras);
  }

  LogDet log_det() const override {
    return log_det_;
  }

  std::optional<size_t> condition_count() const override {
    return std::nullopt; // the module looks at them
  }

  torch::nn::Module& module() override {
    return *module_;
  }

  std::string type_name() const override {
    return module_->name();
  }

 private:
  template <class WithLogDets>
  static Tensors taken(const WithLogDets& result, const RunExtras& extras) {
    const auto& [outputs, log_det] = result;
    extras.log_det->add(log_det);
    return pack(outputs);
  }

  std::shared_ptr<M> module_;
  LogDet log_det_;
};

/// The Invertible of any module that can be checked.
template <class M>
std::shared_ptr<Invertible> checked_map(const std::shared_ptr<M>& module) {
  return as_invertible(module);
}

template <class M, class Forward, class Inverse>
std::shared_ptr<Invertible> checked_map(
    const std::shared_ptr<InvertibleModuleWrapperImpl<M, Forward, Inverse>>&
        wrapper) {
  if constexpr (maps_tensor_given_v<Forward, Inverse>) {
    using Wrapper = InvertibleModuleWrapperImpl<M, Forward, Inverse>;
    return std::make_shared<FrontEndMap<Wrapper>>(
        wrapper, checked_map(wrapper->module.ptr())->log_det());
  } else {
    return as_invertible(wrapper);
  }
}

inline std::shared_ptr<Invertible> checked_map(
    const std::shared_ptr<MultiScaleImpl>& flow) {
  LogDet log_det = LogDet::kZero;
  for (size_t i = 0; i < flow->size(); ++i) {
    const ReversibleSequence level = flow->level(i);
    const LogDet of_level = static_cast<const Invertible&>(*level).log_det();
    if (of_level == LogDet::kUnknown || log_det == LogDet::kZero) {
      log_det = of_level;
    }
    if (log_det == LogDet::kUnknown) {
      break;
    }
  }
  return std::make_shared<FrontEndMap<MultiScaleImpl>>(flow, log_det);
}

} // namespace memcnn::detail

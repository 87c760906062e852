// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/log_det_sum.h>
#include <memcnn/given.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// One map of a module that maps one tensor to one, with ordinary autograd.
inline WithLogDet run_plainly(
    Invertible& block,
    Direction direction,
    const at::Tensor& input,
    const std::vector<at::Tensor>& conditions,
    bool with_log_det) {
  Recording off = Recording::off();
  std::optional<LogDetSum> log_det;
  if (with_log_det) {
    log_det.emplace(input);
  }
  WithLogDet result;
  result.output = block.run_with(
      direction,
      {input},
      RunExtras{conditions, log_det ? &*log_det : nullptr},
      off)[0];
  if (log_det) {
    result.log_det = log_det->take();
  }
  return result;
}

/// What users call of an invertible module of this library that maps one tensor
/// to one: the base of couplings, layers and sequences.
///
/// A module has a forward() of its own as well, which calls this one: LibTorch's
/// AnyModule takes no inherited one. By itself these methods run the module plainly, with ordinary autograd; what
/// saves memory overrides map().
class TensorMap : public Invertible, public ConditionalMap {
 public:
  at::Tensor forward(const at::Tensor& input) {
    return map(Direction::kForward, input, {}, /*with_log_det=*/false).output;
  }

  /// Undoes forward().
  at::Tensor inverse(const at::Tensor& output) {
    return map(Direction::kInverse, output, {}, /*with_log_det=*/false).output;
  }

  /// forward(), and its log-determinant, (N): one number a sample.
  WithLogDet forward_with_log_det(const at::Tensor& input) {
    return map(Direction::kForward, input, {}, /*with_log_det=*/true);
  }

  /// inverse(), and its own log-determinant: the negative of forward's.
  WithLogDet inverse_with_log_det(const at::Tensor& output) {
    return map(Direction::kInverse, output, {}, /*with_log_det=*/true);
  }

  /// The same four methods under conditions.
  Given given(std::vector<at::Tensor> conditions) {
    return {module().weak_from_this().lock(), *this, std::move(conditions)};
  }

 private:
  std::vector<at::Tensor> run_with(
      Direction direction,
      std::vector<at::Tensor> inputs,
      const RunExtras& extras,
      Recording& recording) override = 0;

  std::vector<at::Tensor> run(
      Direction direction,
      std::vector<at::Tensor> inputs,
      Recording& recording) final {
    return run_with(direction, std::move(inputs), RunExtras(), recording);
  }

 protected:
  WithLogDet map(
      Direction direction,
      const at::Tensor& input,
      const std::vector<at::Tensor>& conditions,
      bool with_log_det) override {
    return run_plainly(*this, direction, input, conditions, with_log_det);
  }

  /// That of a module inside of this one, which `inner` runs.
  static WithLogDet map_of(
      torch::nn::Module& module,
      Invertible& inner,
      Direction direction,
      const at::Tensor& input,
      const std::vector<at::Tensor>& conditions,
      bool with_log_det) {
    if (auto* const own = dynamic_cast<ConditionalMap*>(&module)) {
      return own->map(direction, input, conditions, with_log_det);
    }
    return run_plainly(inner, direction, input, conditions, with_log_det);
  }
};

} // namespace memcnn::detail

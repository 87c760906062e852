// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>
#include <memcnn/detail/generator_state.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/in_destructor.h>
#include <memcnn/detail/module_state.h>
#include <memcnn/detail/parts.h>
#include <memcnn/flow/act_norm.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace memcnn {
namespace detail {

/// While it lives, every ActNorm of a model sets itself from what it sees next.
class ArmedActNorms {
 public:
  explicit ArmedActNorms(torch::nn::Module& model) {
    for_each_part(model, [&](torch::nn::Module& part) {
      auto* const norm = dynamic_cast<ActNormImpl*>(&part);
      if (norm != nullptr && !norm->is_armed_) { // a part may be met twice
        norm->is_armed_ = true;
        norms_.push_back(norm);
      }
    });
  }
  ArmedActNorms(const ArmedActNorms&) = delete;
  ArmedActNorms& operator=(const ArmedActNorms&) = delete;
  ~ArmedActNorms() {
    for (ActNormImpl* norm : norms_) {
      norm->is_armed_ = false;
    }
  }

  /// How many have set themselves.
  size_t count_set() const {
    size_t count = 0;
    for (const ActNormImpl* norm : norms_) {
      count += norm->is_armed_ ? 0 : 1;
    }
    return count;
  }

 private:
  std::vector<ActNormImpl*> norms_;
};

/// Leaves the buffers of a model as it found them.
class BuffersGuard {
 public:
  explicit BuffersGuard(const torch::nn::Module& model) {
    for_each_buffer(model, [&](const at::Tensor& buffer) {
      found_.push_back({buffer, buffer.detach().clone(), version_of(buffer)});
    });
  }
  BuffersGuard(const BuffersGuard&) = delete;
  BuffersGuard& operator=(const BuffersGuard&) = delete;
  ~BuffersGuard() {
    in_destructor([&] {
      for (const Buffer& buffer : found_) {
        rewind(buffer.tensor, buffer.value, buffer.version);
      }
    });
  }

 private:
  struct Buffer {
    at::Tensor tensor;
    at::Tensor value;
    uint32_t version;
  };

  std::vector<Buffer> found_;
};

/// What initialize() does of a model that `run` runs.
template <class Run>
size_t initialize_by(
    torch::nn::Module& model,
    const at::Tensor& batch,
    const Run& run) {
  TORCH_CHECK_VALUE(
      batch.defined() && batch.numel() > 0,
      "memcnn::initialize(): expected a batch of some samples, but got ",
      describe(batch),
      ". Pass the first batch of the training data.");
  const at::NoGradGuard no_grad;
  const GeneratorGuard generators(batch.device());
  const BuffersGuard buffers(model);
  const ArmedActNorms norms(model);
  run();
  return norms.count_set();
}

} // namespace detail

/// Runs a model forward once, without a graph, and lets every ActNorm in it, in
/// whatever depth, set its parameters from what it sees on the way: so that each
/// channel of its result has mean 0 and standard deviation 1 over the batch. A
/// channel that deviates by less than 1e-6 keeps its scale. Returns how many were
/// set: those that ran, each by its first run.
///
/// Apart from these the model is left as it was found: modes, statistics of batch
/// normalisation and other buffers, default generators. Call it again, and all
/// are set anew.
///
/// Throws:   c10::ValueError if the batch is empty.
/// Source:   Kingma and Dhariwal 2018, Glow, section 3.1, arXiv:1807.03039.
/// Example:
///   memcnn::initialize(flow, first_batch);
///   memcnn::initialize(conditional_flow, first_batch, {features});
template <class Flow>
size_t initialize(Flow&& flow, const at::Tensor& batch) {
  if constexpr (detail::is_any_module_v<std::decay_t<Flow>>) {
    return detail::initialize_by(
        *flow.ptr(), batch, [&] { flow.forward(batch); });
  } else if constexpr (detail::is_holder_v<std::decay_t<Flow>>) {
    return detail::initialize_by(
        *flow.ptr(), batch, [&] { flow->forward(batch); });
  } else {
    return detail::initialize_by(flow, batch, [&] { flow.forward(batch); });
  }
}

/// Likewise under conditions, of a model that has given().
template <class Flow>
size_t initialize(
    Flow&& flow,
    const at::Tensor& batch,
    const std::vector<at::Tensor>& conditions) {
  if constexpr (detail::is_holder_v<std::decay_t<Flow>>) {
    return detail::initialize_by(
        *flow.ptr(), batch, [&] { flow->given(conditions).forward(batch); });
  } else {
    return detail::initialize_by(
        flow, batch, [&] { flow.given(conditions).forward(batch); });
  }
}

} // namespace memcnn

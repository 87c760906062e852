// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/tensors.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cstdint>

namespace memcnn::detail {

inline int64_t count_values(const Tensors& tensors) {
  int64_t count = 0;
  for (const at::Tensor& tensor : tensors) {
    count += tensor.numel();
  }
  return count;
}

/// The derivatives of one value of an output by all inputs.
inline at::Tensor
jacobian_row(const at::Tensor& output, int64_t index, const Tensors& inputs) {
  at::Tensor seed = at::zeros_like(output, at::MemoryFormat::Contiguous);
  seed.view(-1)[index].fill_(1);
  const Tensors grads = torch::autograd::grad(
      {output},
      inputs,
      {seed},
      /*retain_graph=*/true,
      /*create_graph=*/false,
      /*allow_unused=*/true);
  Tensors parts;
  for (size_t i = 0; i < inputs.size(); ++i) {
    parts.push_back((grads[i].defined() ? grads[i] : at::zeros_like(inputs[i]))
                        .flatten()
                        .to(at::kCPU, at::kDouble));
  }
  return at::cat(parts);
}

/// The Jacobian of outputs by the inputs that they were computed from, all
/// flattened and one after the other; a backward pass for each row.
inline at::Tensor jacobian(const Tensors& outputs, const Tensors& inputs) {
  Tensors rows;
  for (const at::Tensor& output : outputs) {
    for (int64_t i = 0; i < output.numel(); ++i) {
      rows.push_back(
          output.requires_grad()
              ? jacobian_row(output, i, inputs)
              : at::zeros({count_values(inputs)}, at::kDouble));
    }
  }
  return at::stack(rows);
}

/// log |det| of Jacobians.
struct JacobianLogDets {
  at::Tensor of_all; ///< of the batch as a whole, ()
  at::Tensor of_samples; ///< (N); undefined where samples depend on others
};

/// For each value the sample it is of; undefined where dimension 0 is not that
/// of the samples.
inline at::Tensor samples_of_values(const Tensors& tensors, int64_t samples) {
  Tensors parts;
  for (const at::Tensor& tensor : tensors) {
    if (tensor.dim() == 0 || tensor.size(0) != samples) {
      return {};
    }
    parts.push_back(
        at::arange(samples).repeat_interleave(tensor.numel() / samples));
  }
  return at::cat(parts);
}

/// Of as many outputs as inputs, of which there is at least one value.
inline JacobianLogDets jacobian_log_dets(
    const Tensors& outputs,
    const Tensors& inputs) {
  const at::Tensor all = jacobian(outputs, inputs);
  JacobianLogDets result;
  result.of_all = std::get<1>(at::linalg_slogdet(all));

  const int64_t samples = inputs[0].dim() > 0 ? inputs[0].size(0) : 0;
  const at::Tensor rows = samples_of_values(outputs, samples);
  const at::Tensor columns = samples_of_values(inputs, samples);
  if (!rows.defined() || !columns.defined()) {
    return result;
  }
  const at::Tensor across = rows.unsqueeze(1).ne(columns.unsqueeze(0));
  if (all.masked_select(across).ne(0).any().item<bool>()) {
    return result;
  }
  Tensors of_samples;
  for (int64_t n = 0; n < samples; ++n) {
    const at::Tensor own =
        all.index_select(0, rows.eq(n).nonzero().flatten())
            .index_select(1, columns.eq(n).nonzero().flatten());
    of_samples.push_back(std::get<1>(at::linalg_slogdet(own)));
  }
  result.of_samples = at::stack(of_samples);
  return result;
}

} // namespace memcnn::detail

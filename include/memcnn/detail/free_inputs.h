// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/capture.h>
#include <memcnn/detail/chain_nodes.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/freed_storage.h>
#include <memcnn/detail/node.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cstddef>
#include <string>

namespace memcnn::detail {

/// What one of our nodes knows of its outputs; null for other nodes.
inline const NodeState* state_of(const torch::autograd::Node& node) {
  const auto* end_of_chain = dynamic_cast<const OutputNode*>(&node);
  return end_of_chain != nullptr ? &end_of_chain->state()
                                 : state_of_function(node);
}

/// How many tensors the node that made `tensor` keeps on its memory.
inline size_t owners_in_producer(const at::Tensor& tensor) {
  const auto node = tensor.grad_fn();
  if (node == nullptr) {
    return 0;
  }
  if (const NodeState* state = state_of(*node)) {
    return static_cast<size_t>(std::count_if(
        state->outputs.begin(), state->outputs.end(), [&](const Saved& own) {
          return own.defined() && own.get().is_alias_of(tensor);
        }));
  }
  return saves_its_output(*node) ? 1 : 0;
}

/// What who reads a freed input is told.
inline std::string message_of_freed(
    const NodeState& state,
    const at::Tensor& input) {
  return c10::str(
      "memcnn: ",
      state.place,
      ": expected its input not to be read between the call and its backward "
      "pass, but got a read of the freed tensor (",
      describe(input),
      ", block ",
      state.block->type_name(),
      "). Set InvertibleModuleWrapperOptions().",
      state.direction == Direction::kForward ? "keep_input"
                                             : "keep_input_inverse",
      "(true) on that block, or read the tensor before it.");
}

/// Why the memory of an input may not be freed; null if it may.
inline const char* reason_to_keep(
    const at::Tensor& input,
    const Tensors& outputs) {
  for (const at::Tensor& output : outputs) {
    if (output.is_alias_of(input)) {
      return "an output shares its storage";
    }
  }
  const char* const reason =
      FreedStorage::reason_to_keep(input, owners_in_producer(input));
  if (reason == nullptr && capture_of(input.device()) != 0 &&
      !is_of_this_capture(input)) { // Note [Graph capture], rule 4
    return "it was made before the capture, and every replay reads it";
  }
  return reason;
}

/// Frees the memory of a run's inputs until backward, where nobody else is seen
/// to need it (Note [Freed inputs], rule 2). Returns why an input was kept, or
/// "" where none was.
inline const char*
free_inputs(const Tensors& inputs, const Tensors& outputs, NodeState& state) {
  if (state.keep_inputs) {
    return "keep_input is set";
  }
  const char* kept_because = "";
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor& input = inputs[i];
    if (state.inputs[i].defined()) {
      continue; // an integer tensor: it cannot be rebuilt
    }
    const char* const reason = reason_to_keep(input, outputs);
    if (reason == nullptr) {
      state.freed[i].emplace(input, message_of_freed(state, input));
    } else {
      kept_because = reason;
    }
  }
  // All that can fail is done (rule 4).
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (state.freed[i]) {
      state.freed[i]->free(inputs[i]);
    }
  }
  return kept_because;
}

} // namespace memcnn::detail

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/at_place.h>
#include <memcnn/detail/kept_run.h>
#include <memcnn/detail/node_state.h>
#include <memcnn/invertible.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <cstddef>
#include <exception>
#include <string>
#include <utility>

namespace memcnn::detail {

/// Where in a chain something failed: "ReversibleSequence::forward(): block 7
/// (AffineCoupling)".
inline std::string
place_of_block(const char* method, size_t i, const Invertible& block) {
  return c10::str(
      "ReversibleSequence::",
      method,
      "(): block ",
      i,
      " (",
      block.type_name(),
      ")");
}

/// Runs what the i-th block does in backward, where the caller is far away: the
/// place matters more than the type, so that other exceptions become a
/// c10::Error.
template <class Fn>
auto at_block_in_backward(size_t i, const Invertible& block, const Fn& fn) {
  const auto here = [&] {
    return place_of_block("backward", i, block);
  };
  try {
    return at_place(here, fn);
  } catch (const c10::Error&) {
    throw;
  } catch (const std::exception& error) {
    TORCH_CHECK(false, here(), ": ", error.what());
  }
}

/// The backward step of the i-th block of a chain, which may have kept its graph
/// within a budget.
inline BeforeRun block_step_back(
    size_t i,
    Invertible& block,
    Direction direction,
    AfterRun after,
    Recording& recording,
    ParameterGradients& parameters) {
  return at_block_in_backward(i, block, [&] {
    return KeptRun::of(recording)
        ? kept_backward_step(block, std::move(after), recording, parameters)
        : step_back(block, direction, std::move(after), recording, parameters);
  });
}

} // namespace memcnn::detail

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/at_place.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/kept_blocks.h>
#include <memcnn/detail/kept_run.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/streams.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// How a chain runs: as ReversibleSequenceOptions say, and in which mode.
struct ChainSettings {
  int64_t memory_budget = 0; // bytes
  std::optional<at::MemoryFormat> memory_format;
  bool training = true;
};

/// The blocks of a ReversibleSequence, one after the other: what runs in
/// forward and in backward, and where it failed.
///
/// To read next: detail/streams.h, what travels between two blocks, and
/// detail/kept_blocks.h, what blocks keep of their activations.
class Chain {
 public:
  void push_back(std::shared_ptr<Invertible> block) {
    blocks_.push_back(std::move(block));
  }

  size_t size() const {
    return blocks_.size();
  }

  /// What the last recorded run kept.
  KeptActivations kept() const {
    return plan_.kept();
  }

  /// y = f_n(... f_1(x)), or back.
  at::Tensor run(
      Direction direction,
      at::Tensor input,
      Recording& recording,
      const ChainSettings& settings) {
    check_format(direction, input, settings);
    if (recording.is_recording()) {
      recording.note_format(settings.memory_format);
    }
    std::optional<KeptBlocks> budget =
        budget_for(direction, input, recording, settings);
    Streams streams(std::move(input), settings.memory_format);
    for (size_t k = 0; k < size(); ++k) {
      const size_t i = block_at(direction, k);
      const auto here = [&] {
        return place(name_of(direction), i);
      };
      at_place(here, [&] {
        Tensors inputs = streams.take_for(*blocks_[i]);
        streams.set(run_block(
            direction, i, std::move(inputs), recording.block(i), budget));
      });
    }
    if (recording.is_recording()) {
      note_kept(budget);
    }
    return streams.take_whole();
  }

  /// From y and its gradient to x and its own, block by block. One output, one
  /// input; the input was not kept.
  BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) {
    // As in forward: options may have changed since.
    Streams values(std::move(after.outputs[0]), recording.format());
    Streams grads(std::move(after.grad_outputs[0]), recording.format());
    for (size_t k = size(); k-- > 0;) {
      const size_t i = block_at(direction, k);
      at_block_in_backward(i, [&] {
        AfterRun block;
        block.outputs = values.take_for(*blocks_[i]);
        block.grad_outputs = grads.take_for(*blocks_[i]);
        block.kept_inputs.resize(block.outputs.size());
        block.needs_grad.assign(
            block.outputs.size(), k > 0 || after.needs_grad[0]);
        block.retain_graph = after.retain_graph;
        BeforeRun before = step_back(
            direction, i, std::move(block), recording.block(i), parameters);
        if (!after.retain_graph) {
          recording.block(i).let_go_results();
        }
        values.set(std::move(before.inputs));
        grads.set(std::move(before.grad_inputs));
      });
    }
    return {{values.take_whole()}, {grads.take_whole()}};
  }

 private:
  Tensors run_block(
      Direction direction,
      size_t i,
      Tensors inputs,
      Recording& recording,
      std::optional<KeptBlocks>& budget) {
    Invertible& block = *blocks_[i];
    if (recording.is_recording()) {
      recording.note_inputs(inputs);
    }
    return budget ? budget->run(block, direction, std::move(inputs), recording)
                  : block.run(direction, std::move(inputs), recording);
  }

  BeforeRun step_back(
      Direction direction,
      size_t i,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) {
    Invertible& block = *blocks_[i];
    return KeptRun::of(recording)
        ? kept_backward_step(block, std::move(after), recording, parameters)
        : block.backward_step(
              direction, std::move(after), recording, parameters);
  }

  /// The k-th block to run in a direction.
  size_t block_at(Direction direction, size_t k) const {
    return direction == Direction::kForward ? k : size() - 1 - k;
  }

  /// What keeps activations within a budget; nothing where there is none. Inside
  /// a block that keeps its graph anyway there is nothing to decide.
  std::optional<KeptBlocks> budget_for(
      Direction direction,
      const at::Tensor& input,
      const Recording& recording,
      const ChainSettings& settings) {
    if (!recording.is_recording() || settings.memory_budget == 0 ||
        at::GradMode::is_enabled()) {
      return std::nullopt;
    }
    const BudgetPlan::Kind kind = BudgetPlan::kind_of(
        direction,
        settings.memory_budget,
        input,
        settings.training,
        trained_parameters(),
        size());
    return std::make_optional<KeptBlocks>(
        settings.memory_budget, plan_.blocks(kind));
  }

  size_t trained_parameters() const {
    size_t count = 0;
    for (const auto& block : blocks_) {
      for_each_parameter(block->module(), [&](const at::Tensor& parameter) {
        count += parameter.requires_grad();
      });
    }
    return count;
  }

  void note_kept(std::optional<KeptBlocks>& budget) {
    if (!budget) {
      plan_.set(KeptActivations(), nullptr, std::nullopt);
      return;
    }
    budget->end();
    plan_.set(budget->kept(), budget->plan_before(), budget->plan());
  }

  /// "ReversibleSequence::forward(): block 7 (AffineCoupling)"
  std::string place(const char* method, size_t i) const {
    return c10::str(
        "ReversibleSequence::",
        method,
        "(): block ",
        i,
        " (",
        blocks_[i]->type_name(),
        ")");
  }

  /// Runs what a block does in backward, where the caller is far away: the place
  /// matters more than the type, so that other exceptions become a c10::Error.
  template <class Fn>
  void at_block_in_backward(size_t i, const Fn& fn) const {
    const auto here = [&] {
      return place("backward", i);
    };
    try {
      at_place(here, fn);
    } catch (const c10::Error&) {
      throw;
    } catch (const std::exception& error) {
      TORCH_CHECK(false, here(), ": ", error.what());
    }
  }

  static void check_format(
      Direction direction,
      const at::Tensor& input,
      const ChainSettings& settings) {
    const auto format = settings.memory_format;
    const int64_t dims = format == at::MemoryFormat::ChannelsLast ? 4
        : format == at::MemoryFormat::ChannelsLast3d              ? 5
                                                                  : input.dim();
    TORCH_CHECK_VALUE(
        format != at::MemoryFormat::Preserve,
        "ReversibleSequence::",
        name_of(direction),
        "(): expected a memory_format to convert to, but got Preserve. Set "
        "none for that of the input.");
    TORCH_CHECK_VALUE(
        input.dim() == dims,
        "ReversibleSequence::",
        name_of(direction),
        "(): expected an input of ",
        dims,
        " dims for its memory_format, but got ",
        describe(input),
        ". Set ChannelsLast for images (N, C, H, W), ChannelsLast3d for "
        "volumes, or no memory_format.");
  }

  std::vector<std::shared_ptr<Invertible>> blocks_;
  BudgetPlan plan_;
};

} // namespace memcnn::detail

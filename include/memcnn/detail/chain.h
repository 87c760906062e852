// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/at_place.h>
#include <memcnn/detail/chain_block.h>
#include <memcnn/detail/chain_graph.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/kept_blocks.h>
#include <memcnn/detail/node_state.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/streams.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <cstddef>
#include <cstdint>
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
/// To read next: detail/streams.h, what travels between two blocks,
/// detail/chain_nodes.h, what backward does, and detail/kept_blocks.h, what
/// blocks keep of their activations.
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
    return run_blocks(
        direction, std::move(input), recording, settings, /*graph=*/nullptr);
  }

  /// Likewise, as nodes of the caller's graph (Note [Nodes of a chain]).
  at::Tensor run_as_nodes(
      Direction direction,
      const at::Tensor& input,
      RecordingOptions options,
      const ChainSettings& settings) {
    const auto place =
        std::string("ReversibleSequence::") + name_of(direction) + "()";
    check_defined(place, {input});
    ChainGraph graph(place, direction, options, input);
    Recording recording = Recording::start(options);
    const at::NoGradGuard no_grad;
    return run_blocks(direction, input, recording, settings, &graph);
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
      AfterRun block;
      block.outputs = values.take_for(*blocks_[i]);
      block.grad_outputs = grads.take_for(*blocks_[i]);
      block.kept_inputs.resize(block.outputs.size());
      block.needs_grad.assign(
          block.outputs.size(), k > 0 || after.needs_grad[0]);
      block.retain_graph = after.retain_graph;
      BeforeRun before = block_step_back(
          i,
          *blocks_[i],
          direction,
          std::move(block),
          recording.block(i),
          parameters);
      if (!after.retain_graph) {
        recording.block(i).let_go_results();
      }
      values.set(std::move(before.inputs));
      grads.set(std::move(before.grad_inputs));
    }
    return {{values.take_whole()}, {grads.take_whole()}};
  }

 private:
  /// Runs the blocks. With a graph those that learn nothing, and come before all
  /// that do, are not recorded.
  at::Tensor run_blocks(
      Direction direction,
      at::Tensor input,
      Recording& recording,
      const ChainSettings& settings,
      ChainGraph* graph) {
    check_format(direction, input, settings);
    if (recording.is_recording()) {
      recording.note_format(settings.memory_format);
    }
    const size_t first =
        graph != nullptr ? first_to_learn(direction, input) : 0;
    std::optional<KeptBlocks> budget =
        budget_for(direction, input, recording, settings, size() - first);
    Streams streams(std::move(input), settings.memory_format);
    for (size_t k = 0; k < size(); ++k) {
      const size_t i = block_at(direction, k);
      const auto here = [&] {
        return place_of_block(name_of(direction), i, *blocks_[i]);
      };
      at_place(here, [&] {
        const auto split_dim = streams.split_dim();
        Tensors inputs = streams.take_for(*blocks_[i]);
        if (k < first) {
          streams.set(run_unrecorded(direction, *blocks_[i], inputs));
          return;
        }
        if (graph != nullptr) {
          graph->take(split_dim, streams, inputs);
        }
        Tensors outputs = run_block(
            direction, i, std::move(inputs), recording.block(i), budget);
        if (graph != nullptr) {
          graph->add(i, blocks_[i], outputs);
        }
        streams.set(std::move(outputs));
      });
    }
    if (recording.is_recording()) {
      note_kept(budget);
    }
    if (graph == nullptr) {
      return streams.take_whole();
    }
    Streams form = streams.form();
    return graph->end(streams.take_whole(), std::move(form), recording);
  }

  /// The first block of a run whose backward somebody may ask for; all have
  /// run alike by then.
  size_t first_to_learn(Direction direction, const at::Tensor& input) const {
    size_t first = 0;
    while (!input.requires_grad() && first + 1 < size() &&
           !any_parameter(
               blocks_[block_at(direction, first)]->module(),
               [](const at::Tensor& p) { return p.requires_grad(); })) {
      ++first;
    }
    return first;
  }

  /// Runs a block that has nothing to learn. Should it reach a tensor that
  /// nobody registered, and that has, its outputs say so, where they may have a
  /// graph.
  static Tensors
  run_unrecorded(Direction direction, Invertible& block, Tensors& inputs) {
    const at::AutoGradMode with_graph(true);
    Recording off = Recording::off();
    Tensors outputs = block.run(direction, std::move(inputs), off);
    ends_of(outputs, /*arguments=*/{}, block.module());
    return outputs;
  }

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
      const ChainSettings& settings,
      size_t recorded_blocks) {
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
        recorded_blocks);
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

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/at_place.h>
#include <memcnn/detail/chain_block.h>
#include <memcnn/detail/chain_graph.h>
#include <memcnn/detail/condition_choice.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/gradient.h>
#include <memcnn/detail/kept_blocks.h>
#include <memcnn/detail/log_det_sum.h>
#include <memcnn/detail/node_state.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/streams.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <algorithm>
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
  int64_t anchor_every = 0; // blocks; 0 is never
};

/// The blocks of a ReversibleSequence, one after the other: what runs in
/// forward and in backward, and where it failed.
///
/// To read next: detail/streams.h, what travels between two blocks,
/// detail/chain_nodes.h, what backward does, and detail/kept_blocks.h, what
/// blocks keep of their activations.
class Chain {
 public:
  /// `conditions`: which of those that the chain is given the block gets; none
  /// for as many as it takes, in their order.
  void push_back(
      std::shared_ptr<Invertible> block,
      std::optional<std::vector<size_t>> conditions) {
    blocks_.push_back(std::move(block));
    choices_.emplace_back(std::move(conditions));
  }

  size_t size() const {
    return blocks_.size();
  }

  /// What the last recorded run kept.
  KeptActivations kept() const {
    return plan_.kept();
  }

  /// What is known of the log-determinant: as little as of any block.
  LogDet log_det() const {
    LogDet known = LogDet::kZero;
    for (const auto& block : blocks_) {
      const LogDet of_block = block->log_det();
      if (of_block == LogDet::kUnknown) {
        return LogDet::kUnknown;
      }
      if (of_block == LogDet::kSample) {
        known = LogDet::kSample;
      }
    }
    return known;
  }

  /// How many conditions the blocks take together: those that each is to get.
  size_t condition_count() const {
    size_t count = 0;
    for (size_t i = 0; i < size(); ++i) {
      count = (std::max)(count, choices_[i].needed(*blocks_[i]));
    }
    return count;
  }

  /// y = f_n(... f_1(x)), or back.
  at::Tensor run(
      Direction direction,
      at::Tensor input,
      const RunExtras& extras,
      Recording& recording,
      const ChainSettings& settings) {
    return run_blocks(
               {direction, extras, recording, settings, /*graph=*/nullptr},
               std::move(input))
        .output;
  }

  /// Likewise, as nodes of the caller's graph (Note [Nodes of a chain]).
  WithLogDet run_as_nodes(
      Direction direction,
      const at::Tensor& input,
      at::TensorList conditions,
      bool with_log_det,
      RecordingOptions options,
      const ChainSettings& settings) {
    const auto place =
        std::string("ReversibleSequence::") + name_of(direction) + "()";
    check_defined(place, {input});
    std::optional<LogDetSum> log_det;
    if (with_log_det) {
      log_det.emplace(input);
    }
    ChainGraph graph(place, direction, options, input);
    Recording recording = Recording::start(options);
    const RunExtras extras{conditions, log_det ? &*log_det : nullptr};
    const at::NoGradGuard no_grad;
    return run_blocks({direction, extras, recording, settings, &graph}, input);
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
    Tensors grad_conditions(after.conditions.size());
    for (size_t k = size(); k-- > 0;) {
      const size_t i = block_at(direction, k);
      const auto split_dim = recording.block(i).split_dim();
      AfterRun block = after_block(i, after);
      block.outputs = recording.block(i).outputs_or(
          values.take_in(split_dim, blocks_[i]->type_name()),
          after.retain_graph);
      block.grad_outputs = grads.take_in(split_dim, blocks_[i]->type_name());
      block.kept_inputs.resize(block.outputs.size());
      block.needs_grad.assign(
          block.outputs.size(), k > 0 || after.needs_grad[0]);
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
      add_condition_gradients(
          i, grad_conditions, std::move(before.grad_conditions));
      // The graph of a kept block may lead to one of its halves alone.
      complete_gradients(before.grad_inputs, before.inputs);
      values.set(std::move(before.inputs));
      grads.set(std::move(before.grad_inputs));
    }
    return {
        {values.take_whole()},
        {grads.take_whole()},
        std::move(grad_conditions)};
  }

 private:
  /// One run of all blocks, in forward: what it is given and how it runs.
  struct Run {
    Direction direction;
    const RunExtras& extras;
    Recording& recording;
    const ChainSettings& settings;
    ChainGraph* graph; // null where the blocks are no nodes
    size_t first = 0; // the first block that is recorded
    std::optional<KeptBlocks> budget = std::nullopt;
  };

  /// Runs the blocks. With a graph those that learn nothing, and come before all
  /// that do, are not recorded.
  WithLogDet run_blocks(Run run, at::Tensor input) {
    check_format(run.direction, input, run.settings);
    check_conditions(run.direction, run.extras.conditions);
    if (run.recording.is_recording()) {
      run.recording.note_format(run.settings.memory_format);
      run.recording.note_direction(run.direction);
    }
    if (run.graph != nullptr) {
      run.first = first_to_learn(run.direction, input, run.extras);
    }
    run.budget = budget_for(
        run.direction, input, run.recording, run.settings, size() - run.first);
    Streams streams(std::move(input), run.settings.memory_format);
    for (size_t k = 0; k < size(); ++k) {
      const size_t i = block_at(run.direction, k);
      const auto here = [&] {
        return place_of_block(name_of(run.direction), i, *blocks_[i]);
      };
      at_place(here, [&] { pass_block(run, k, i, streams); });
    }
    if (run.recording.is_recording()) {
      note_kept(run.budget);
    }
    if (run.graph == nullptr) {
      return {streams.take_whole(), at::Tensor()};
    }
    Streams form = streams.form();
    return run.graph->end(
        streams.take_whole(),
        run.extras.log_det != nullptr ? run.extras.log_det->take()
                                      : at::Tensor(),
        std::move(form),
        run.recording);
  }

  /// Takes what travels through the i-th block, which is the k-th to run.
  void pass_block(Run& run, size_t k, size_t i, Streams& streams) {
    go_on_from_anchor(run, i, streams);
    const auto split_dim_before = streams.split_dim();
    Tensors inputs = streams.take_for(*blocks_[i]);
    const Tensors conditions =
        choices_[i].of(*blocks_[i], run.extras.conditions);
    const RunExtras extras{conditions, log_det_for(i, run.extras)};
    if (k < run.first) {
      streams.set(run_unrecorded(run.direction, *blocks_[i], inputs, extras));
      return;
    }
    if (run.graph != nullptr) {
      run.graph->take(split_dim_before, streams, inputs);
    }
    Recording& recording = run.recording.block(i);
    if (recording.is_recording()) {
      recording.note_split_dim(streams.split_dim());
    }
    Tensors outputs = run_block(
        run.direction, i, std::move(inputs), extras, recording, run.budget);
    if (run.graph != nullptr) {
      run.graph->add(i, blocks_[i], extras, outputs);
    }
    if (recording.is_recording() && is_anchor(run, k)) {
      recording.keep_outputs(outputs);
    }
    streams.set(std::move(outputs));
  }

  /// A run that goes back over a recorded one, to rebuild its input, goes on from
  /// what the block returned in that one, where this was kept.
  void go_on_from_anchor(const Run& run, size_t i, Streams& streams) const {
    if (run.recording.direction() != opposite(run.direction)) {
      return;
    }
    Recording& recording = run.recording.block(i);
    Tensors outputs =
        streams.take_in(recording.split_dim(), blocks_[i]->type_name());
    streams.set(
        recording.outputs_or(std::move(outputs), /*retain_graph=*/true));
  }

  /// Whether what the k-th block of a run returns is kept: the last one's is, in
  /// any case.
  bool is_anchor(const Run& run, size_t k) const {
    const auto every = static_cast<size_t>(run.settings.anchor_every);
    return every > 0 && k + 1 < size() && (k + 1 - run.first) % every == 0;
  }

  /// Where a block adds its log-determinant; null where that is 0, or nobody
  /// asks.
  LogDetSum* log_det_for(size_t i, const RunExtras& extras) const {
    return extras.log_det != nullptr && blocks_[i]->log_det() != LogDet::kZero
        ? extras.log_det
        : nullptr;
  }

  /// Stops where the chain is given too few conditions, or too many.
  void check_conditions(Direction direction, at::TensorList given) const {
    size_t expected = 0;
    for (size_t i = 0; i < size(); ++i) {
      const size_t needed = choices_[i].needed(*blocks_[i]);
      expected = (std::max)(expected, needed);
      TORCH_CHECK_VALUE(
          needed <= given.size(),
          place_of_block(name_of(direction), i, *blocks_[i]),
          ": expected at least ",
          needed,
          " conditions for this block, but got ",
          given.size(),
          ". Pass them to given({...}), in the order in which push_back() "
          "counts them.");
    }
    TORCH_CHECK_VALUE(
        given.size() <= expected,
        "ReversibleSequence::",
        name_of(direction),
        "(): expected ",
        expected,
        " conditions for all blocks, but got ",
        given.size(),
        ". Leave out what no block takes, or say which block gets it by "
        "push_back(block, {...}).");
  }

  /// What the i-th block is told in backward, its outputs and their gradients
  /// apart.
  AfterRun after_block(size_t i, const AfterRun& after) const {
    AfterRun block;
    block.retain_graph = after.retain_graph;
    block.has_log_det =
        after.has_log_det && blocks_[i]->log_det() == LogDet::kSample;
    if (block.has_log_det) {
      block.grad_log_det = after.grad_log_det;
    }
    block.conditions = choices_[i].of(*blocks_[i], after.conditions);
    for (size_t j = 0; j < block.conditions.size(); ++j) {
      block.needs_condition_grad.push_back(
          after.needs_condition_grad[choices_[i].place(j)]);
    }
    return block;
  }

  /// Adds those of the i-th block to those of the chain.
  void add_condition_gradients(size_t i, Tensors& sums, Tensors gradients)
      const {
    for (size_t j = 0; j < gradients.size(); ++j) {
      add_gradient(sums[choices_[i].place(j)], std::move(gradients[j]));
    }
  }

  /// The first block of a run whose backward somebody may ask for; all have
  /// run alike by then.
  size_t first_to_learn(
      Direction direction,
      const at::Tensor& input,
      const RunExtras& extras) const {
    const auto learns = [](const at::Tensor& t) {
      return t.requires_grad();
    };
    size_t first = 0;
    while (!input.requires_grad() && first + 1 < size()) {
      const size_t i = block_at(direction, first);
      const Tensors conditions = choices_[i].of(*blocks_[i], extras.conditions);
      if (any_parameter(blocks_[i]->module(), learns) ||
          std::any_of(conditions.begin(), conditions.end(), learns)) {
        break;
      }
      ++first;
    }
    return first;
  }

  /// Runs a block that has nothing to learn. Should it reach a tensor that
  /// nobody registered, and that has, its outputs say so, where they may have a
  /// graph.
  static Tensors run_unrecorded(
      Direction direction,
      Invertible& block,
      Tensors& inputs,
      const RunExtras& extras) {
    const at::AutoGradMode with_graph(true);
    Recording off = Recording::off();
    Tensors outputs = block.run_with(direction, std::move(inputs), extras, off);
    ends_of(outputs, /*arguments=*/{}, block.module());
    return outputs;
  }

  Tensors run_block(
      Direction direction,
      size_t i,
      Tensors inputs,
      const RunExtras& extras,
      Recording& recording,
      std::optional<KeptBlocks>& budget) {
    Invertible& block = *blocks_[i];
    if (recording.is_recording()) {
      recording.note_inputs(inputs);
    }
    return budget
        ? budget->run(block, direction, std::move(inputs), extras, recording)
        : block.run_with(direction, std::move(inputs), extras, recording);
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
  std::vector<ConditionChoice> choices_; // one a block
  BudgetPlan plan_;
};

} // namespace memcnn::detail

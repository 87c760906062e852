// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/at_place.h>
#include <memcnn/detail/graph_node.h>
#include <memcnn/detail/kept_run.h>
#include <memcnn/detail/kept_segments.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/saved_tensors.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/nn/module.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// Where the graph of a module's run ends. The module's own backward step takes
/// the gradients that arrive here; another one may not pass.
class EndOfRun final : public torch::autograd::Node {
 private:
  Tensors apply(Tensors&& /*gradients*/) override {
    TORCH_CHECK(false, kForeignBackward);
  }
};

/// The tensors as arguments of a run whose graph ends at them, where those that
/// are alike need a gradient. No leaves: the run may change them in place.
inline Tensors ends_at(Tensors tensors, const Tensors& like) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i] = detached(tensors[i]);
    if (like[i].requires_grad()) {
      torch::autograd::set_history(tensors[i], make_node<EndOfRun>());
    }
  }
  return tensors;
}

/// An empty tensor in the place of this one in its graph.
inline at::Tensor place_of(const at::Tensor& tensor) {
  at::Tensor place = at::empty({0}, tensor.options());
  if (tensor.requires_grad()) {
    torch::autograd::impl::set_gradient_edge(
        place, torch::autograd::impl::gradient_edge(tensor));
  }
  return place;
}

/// How a ForwardOnly runs.
struct ForwardOnlySettings {
  bool early_stop = true;
  /// What keeps activations within a budget; null without one.
  std::shared_ptr<KeptSegments> kept;
};

/// A module that runs one way only: its inputs are kept, so that no backward
/// step asks for the inverse.
class ForwardOnly final : public Invertible {
 public:
  using Call = std::function<Tensors(const Tensors&)>;

  /// Its errors say the place, in backward too, where the caller is far away.
  ForwardOnly(
      std::string place,
      std::shared_ptr<torch::nn::Module> module,
      Call call,
      ForwardOnlySettings settings)
      : place_(std::move(place)),
        module_(std::move(module)),
        call_(std::move(call)),
        settings_(std::move(settings)) {}

  Tensors run(Direction direction, Tensors inputs, Recording& recording)
      override {
    TORCH_CHECK(
        direction == Direction::kForward,
        "checkpoint(): expected forward only, but got inverse.");
    const auto here = [&] {
      return place_;
    };
    return at_place(here, [&] {
      return recording.is_recording()
          ? first_run(std::move(inputs), recording)
          : recording.run(/*index=*/0, *module_, std::move(inputs), call_);
    });
  }

  BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) override {
    const auto here = [&] {
      return place_;
    };
    return at_place(here, [&] {
      return step_back(direction, std::move(after), recording, parameters);
    });
  }

  torch::nn::Module& module() override {
    return *module_;
  }

  std::string type_name() const override {
    return module_->name();
  }

 private:
  /// Where the first run's graph is there, a second run has only to provide what
  /// its operators saved (Note [Early stop], rule 1).
  BeforeRun step_back(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) {
    if (!KeptRun::of(recording) || trains() != trains_) {
      return Invertible::backward_step(
          direction, std::move(after), recording, parameters);
    }
    const auto saved = KeptRun::of(recording)->saved;
    const bool runs_again = recording.options().debug || !saved->are_there();
    const bool drops_again = runs_again && after.retain_graph;
    const Recording::ReplayScope scope(recording);
    if (runs_again) {
      second_run(after.kept_inputs, recording);
    }
    BeforeRun before =
        kept_backward_step(*this, std::move(after), recording, parameters);
    if (drops_again) {
      saved->drop();
    }
    return before;
  }

  Tensors first_run(Tensors inputs, Recording& recording) {
    const auto saved =
        settings_.early_stop ? std::make_shared<SavedTensors>() : nullptr;
    // What is kept is decided in this run.
    const std::shared_ptr<KeptSegments> kept = std::move(settings_.kept);
    if (kept != nullptr) {
      kept->begin(saved, held_anyway(inputs));
      if (kept->keeps_results()) {
        recording.keep_results(kept.get());
      }
    }
    Tensors outputs = saved != nullptr
        ? run_with_graph(inputs, saved, kept.get(), recording)
        : recording.run(/*index=*/0, *module_, std::move(inputs), call_);
    if (kept != nullptr) {
      kept->end();
    }
    return outputs;
  }

  Tensors run_with_graph(
      const Tensors& inputs,
      std::shared_ptr<SavedTensors> saved,
      KeptSegments* budget,
      Recording& recording) {
    trains_ = trains();
    KeptRun kept;
    kept.arguments = ends_at(inputs, inputs);
    kept.saved = std::move(saved);
    const auto call = [&](const Tensors& arguments) {
      return kept.saved->note(
          [&] { return call_(arguments); },
          [&] {
            recording.note_stop();
            if (budget != nullptr) {
              budget->make_room();
            }
          });
    };
    Tensors outputs;
    {
      const at::AutoGradMode with_graph(true);
      outputs = recording.run(/*index=*/0, *module_, kept.arguments, call);
    }
    for (at::Tensor& output : outputs) {
      if (output.defined()) {
        kept.outputs.push_back(place_of(output));
        output = detached(output);
      }
    }
    if (kept.saved->is_around_another()) {
      kept.saved->drop();
    } else {
      KeptRun::of(recording) = std::make_shared<KeptRun>(std::move(kept));
    }
    return outputs;
  }

  /// What is there until backward whatever is kept.
  Tensors held_anyway(Tensors inputs) const {
    const auto add = [&](const at::Tensor& tensor) {
      inputs.push_back(tensor);
    };
    for_each_parameter(*module_, add);
    for_each_buffer(*module_, add);
    return inputs;
  }

  void second_run(const Tensors& inputs, Recording& recording) const {
    const KeptRun& kept = *KeptRun::of(recording);
    const auto call = [&](const Tensors& arguments) -> Tensors {
      if (!at::GradMode::is_enabled()) {
        return call_(arguments); // compared with the first
      }
      kept.saved->fill(
          [&] { call_(arguments); }, [&] { recording.note_stop(); });
      return {};
    };
    const at::AutoGradMode with_graph(true);
    recording.run(/*index=*/0, *module_, ends_at(inputs, kept.arguments), call);
  }

  /// Which parameters are trained.
  std::vector<bool> trains() const {
    std::vector<bool> result;
    for_each_parameter(*module_, [&](const at::Tensor& parameter) {
      result.push_back(parameter.requires_grad());
    });
    return result;
  }

  std::string place_;
  std::shared_ptr<torch::nn::Module> module_;
  Call call_;
  ForwardOnlySettings settings_;
  std::vector<bool> trains_;
};

} // namespace memcnn::detail

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/graph_node.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>

#include <atomic>
#include <memory>
#include <utility>

namespace memcnn::detail {

/// Interface: who is given what operators of this thread save for backward.
class TensorSaver {
 public:
  virtual ~TensorSaver() = default;

  /// The hooks of the next tensor that an operator saves.
  virtual std::unique_ptr<torch::autograd::SavedVariableHooks> next_hooks() = 0;

  /// The saver of this thread, or null.
  static TensorSaver*& current() {
    static thread_local TensorSaver* saver = nullptr;
    return saver;
  }
};

/// The default engine of autograd, with hooks for saved tensors where a thread
/// has a saver.
///
/// LibTorch asks its default engine for these hooks. Python's engine has them,
/// as torch.autograd.graph.saved_tensors_hooks; that of C++ has none, and no
/// place to set any. This one takes its place, as Python's does, and passes all
/// else on to the one that it found. It computes nothing and starts no thread.
class SavingEngine final : public torch::autograd::Engine {
 public:
  /// Becomes the default engine, if another one is: at the first use, and after
  /// Python came into the process.
  static void install() {
    Engine& found = get_default_engine();
    if (&found != &instance()) {
      instance().found_ = &found;
      torch::autograd::set_default_engine_stub(&as_engine);
    }
  }

  torch::autograd::variable_list execute(
      const torch::autograd::edge_list& roots,
      const torch::autograd::variable_list& inputs,
      bool keep_graph,
      bool create_graph,
      bool accumulate_grad,
      const torch::autograd::edge_list& outputs) override {
    return found().execute(
        roots, inputs, keep_graph, create_graph, accumulate_grad, outputs);
  }

  c10::intrusive_ptr<at::ivalue::Future> execute_with_graph_task(
      const std::shared_ptr<torch::autograd::GraphTask>& graph_task,
      NodePtr graph_root,
      torch::autograd::InputBuffer&& input_buffer) override {
    return found().execute_with_graph_task(
        graph_task, std::move(graph_root), std::move(input_buffer));
  }

  std::unique_ptr<torch::autograd::AnomalyMetadata> make_anomaly_metadata()
      override {
    return found().make_anomaly_metadata();
  }

  std::unique_ptr<torch::autograd::SavedVariableHooks>
  get_default_saved_variable_hooks() override {
    TensorSaver* saver = TensorSaver::current();
    return saver != nullptr ? saver->next_hooks()
                            : found().get_default_saved_variable_hooks();
  }

 private:
  SavingEngine() = default;

  /// Never destroyed: backward may run until the program ends.
  static SavingEngine& instance() {
    static auto* const engine = new SavingEngine;
    return *engine;
  }

  static Engine& as_engine() {
    return instance();
  }

  Engine& found() const {
    return *found_.load();
  }

  std::atomic<Engine*> found_ = nullptr;
};

} // namespace memcnn::detail

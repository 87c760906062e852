// SPDX-License-Identifier: MIT
#pragma once

// A whole training step as one CUDA graph:
//
//   revnet::CapturedStep step(device, train_on); // fused_sgd.h shows such a one
//   const Tensor loss = step({images, labels})[0];
//
// To copy: it needs LibTorch and no other file. On a CPU, steps run eagerly.

#include <torch/arg.h>
#include <torch/types.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// A LibTorch without CUDA has CUDAGraph.h, too, but not the first of these. Where
// both are there, but a program does not link CUDA, it defines REVNET_NO_CUDA.
#if !defined(REVNET_NO_CUDA) && __has_include(<c10/cuda/impl/cuda_cmake_macros.h>) && \
    __has_include(<cuda_runtime_api.h>)
#define REVNET_HAS_CUDA_GRAPHS 1
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#else
#define REVNET_HAS_CUDA_GRAPHS 0
#endif

namespace revnet {

/// Whether CapturedStep can capture, given a GPU.
inline constexpr bool kHasCudaGraphs = REVNET_HAS_CUDA_GRAPHS;

namespace detail {

/// The work of a device as one graph, which is captured once and replayed.
class Graph {
 public:
  using Function = std::function<void()>;

  virtual ~Graph() = default;
  /// Runs the work eagerly, where it will be captured.
  virtual void warm_up(const Function& work) = 0;
  /// Records the work without running it. If it throws, the graph is of no use.
  virtual void capture(const Function& work) = 0;
  /// Runs what was recorded, on the caller's stream.
  virtual void replay() = 0;
  /// Memory that is for replays alone.
  virtual int64_t bytes() const = 0;
};

#if REVNET_HAS_CUDA_GRAPHS

class CudaGraph final : public Graph {
 public:
  explicit CudaGraph(torch::Device device)
      : stream_(c10::cuda::getStreamFromPool(
            /*isHighPriority=*/false,
            device.index())) {}

  void warm_up(const Function& work) override {
    const auto caller = c10::cuda::getCurrentCUDAStream(stream_.device_index());
    order(caller, stream_);
    try {
      const c10::cuda::CUDAStreamGuard guard(stream_);
      work();
    } catch (...) {
      order(stream_, caller);
      throw;
    }
    order(stream_, caller);
  }

  void capture(const Function& work) override {
    // One that begins in another fails, and ends the program in ~CUDAGraph().
    const auto around = c10::cuda::currentStreamCaptureStatusMayInitCtx();
    TORCH_CHECK(around == c10::cuda::CaptureStatus::None, "another around it.");
    const c10::cuda::CUDAStreamGuard guard(stream_);
    // A graph has memory of its own: what warm-up left cached is in its way.
    c10::cuda::CUDACachingAllocator::emptyCache();
    const int64_t reserved_before = reserved_bytes();
    // Other threads may go on, such as one that pins the next batch.
    graph_.capture_begin(/*pool=*/{0, 0}, cudaStreamCaptureModeThreadLocal);
    try {
      work();
      check_for_work();
      graph_.capture_end();
      bytes_ = reserved_bytes() - reserved_before;
    } catch (...) {
      abandon();
      throw;
    }
  }

  void replay() override {
    graph_.replay();
  }

  int64_t bytes() const override {
    return bytes_;
  }

 private:
  int64_t reserved_bytes() const {
    using namespace c10::cuda::CUDACachingAllocator;
    const auto bytes = getDeviceStats(stream_.device_index()).reserved_bytes;
    return bytes[/*all pools*/ 0].current;
  }

  static void order(const c10::Stream& first, const c10::Stream& then) {
    c10::Event event(first.device_type());
    event.record(first);
    event.block(then);
  }

  /// Stops where a capture has recorded nothing, whose replay would do nothing.
  void check_for_work() const {
#if CUDART_VERSION >= 12000 // before, CUDA does not tell the graph
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaGraph_t graph = nullptr;
    size_t nodes = 0;
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream_, &status, nullptr, &graph));
    if (status == cudaStreamCaptureStatusActive) {
      C10_CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &nodes));
      TORCH_CHECK(nodes > 0, "no work on the stream that it was given.");
    }
#endif
  }

  /// Ends a capture that failed. capture_end() throws if CUDA has declared the
  /// capture invalid, before it tells allocator and generators that they serve
  /// none any more: random numbers would be an error from then on. So it is
  /// given a valid capture to end, of a node that does nothing.
  void abandon() noexcept {
    try {
      cudaGraph_t captured = nullptr;
      cudaStreamEndCapture(stream_, &captured);
      cudaGraphDestroy(captured); // if there is one
      cudaGetLastError(); // reported already
      cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal);
      cudaLaunchHostFunc(
          stream_, [](void*) {}, nullptr);
      graph_.capture_end();
    } catch (const c10::Error&) { // it was ended, but could not be made a graph
    }
  }

  c10::cuda::CUDAStream stream_;
  at::cuda::CUDAGraph graph_;
  int64_t bytes_ = 0;
};

inline std::unique_ptr<Graph> make_graph(torch::Device device) {
  return device.is_cuda() ? std::make_unique<CudaGraph>(device) : nullptr;
}

#else

inline std::unique_ptr<Graph> make_graph(torch::Device) {
  return nullptr;
}

#endif

/// What an error says, without backtrace and advice on how to debug CUDA.
inline std::string reason(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  const std::string text =
      of_torch ? of_torch->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

} // namespace detail

struct CapturedStepOptions {
  /// Calls that run eagerly before the capture, 1 or more, default 11: libraries
  /// start up and choose their kernels in them.
  TORCH_ARG(int64_t, warm_up) = 11;
  /// Whether to capture at all, default true.
  TORCH_ARG(bool, enabled) = true;
};

/// Runs a step given as a function, on a GPU as one CUDA graph.
///
/// The first calls are ordinary steps on a stream of their own. The next one
/// captures the step, and from then on it is replayed: the function itself does
/// not run again. Each call is in order with the caller's current stream.
///
/// A replay works on the memory of the step that was captured. So the step itself
/// begins with setting gradients to none; what changes from step to step is an
/// input, or a tensor that is written in place, as FusedSgd's learning rate is;
/// and weights are loaded before the first call, since torch::load() moves them.
///
/// Shapes:   inputs as those of the first call, on the device; none with a graph.
/// Memory:   on a GPU, copies of the inputs, for the graph what a step needs at
///           its peak, which nothing else can use, and cuBLAS's workspaces of
///           its stream, 32 MiB for each thread on an H100.
/// Throws:   c10::ValueError if inputs differ from the first call's; c10::Error
///           if the step cannot be captured, as if it reads a value on the host;
///           c10::OutOfMemoryError. After an error in capture or replay, every
///           call throws; other work on the GPU goes on.
/// Avoid if: sizes change from step to step, or the host decides what it does.
class CapturedStep final {
 public:
  using Tensors = std::vector<torch::Tensor>;
  using Function = std::function<Tensors(const Tensors&)>;

  CapturedStep(
      torch::Device device,
      Function step,
      CapturedStepOptions options = {})
      : device_(torch::empty({0}, device).device()), // with its index
        step_(std::move(step)),
        options_(std::move(options)) {
    TORCH_CHECK_VALUE(
        options_.warm_up() >= 1,
        "CapturedStep::CapturedStep(): expected warm_up to be 1 or more, but "
        "got ",
        options_.warm_up(),
        ".");
    if (options_.enabled()) {
      graph_ = detail::make_graph(device_);
    }
  }

  /// Runs one step. The outputs, without gradients, are good until the next.
  const Tensors& operator()(const Tensors& inputs = {}) {
    TORCH_CHECK(
        !failed_,
        "CapturedStep::operator(): expected a step whose graph works, but got "
        "one that failed in an earlier call. Make another CapturedStep.");
    check(inputs);
    if (!graph_) {
      outputs_ = run(inputs);
    } else if (copy(inputs); calls_ < options_.warm_up()) {
      in_phase("warm-up", [this] {
        graph_->warm_up([this] { outputs_ = run(inputs_); });
      });
    } else {
      run_graph();
    }
    ++calls_;
    return outputs_;
  }

  /// Whether calls replay a graph by now.
  bool is_captured() const {
    return captured_;
  }

  /// Bytes that the graph keeps for its replays; 0 before the capture.
  int64_t graph_bytes() const {
    return captured_ ? graph_->bytes() : 0;
  }

 private:
  /// Holds the inputs against those of the first call.
  void check(const Tensors& inputs) {
    check_place("inputs", inputs);
    if (calls_ == 0) {
      allocate(inputs);
    }
    TORCH_CHECK_VALUE(
        inputs.size() == inputs_.size(),
        "CapturedStep::operator(): expected ",
        inputs_.size(),
        " inputs as in the first call, but got ",
        inputs.size(),
        ". Make a CapturedStep for each number of inputs.");
    for (size_t i = 0; i < inputs.size(); ++i) {
      const torch::Tensor &first = inputs_[i], &input = inputs[i];
      TORCH_CHECK_VALUE(
          input.dtype() == first.dtype() && input.sizes() == first.sizes(),
          "CapturedStep::operator(): expected input ",
          i,
          " to be, as in the first call, ",
          first.dtype(),
          " of sizes ",
          first.sizes(),
          ", but got ",
          input.dtype(),
          " of sizes ",
          input.sizes(),
          ". Make a CapturedStep for each kind of input.");
    }
  }

  /// What is elsewhere the host made, which does nothing in a replay.
  void check_place(const char* what, const Tensors& tensors) const {
    for (const torch::Tensor& tensor : tensors) {
      TORCH_CHECK_VALUE(
          tensor.defined() && tensor.device() == device_,
          "CapturedStep::operator(): expected ",
          what,
          " on ",
          device_,
          ", but got one ",
          tensor.defined() ? "on " + tensor.device().str() : "undefined",
          ".");
    }
  }

  /// Makes the tensors that a graph reads; without one, their kinds alone.
  void allocate(const Tensors& inputs) {
    const auto device = graph_ ? device_ : torch::Device(torch::kMeta);
    inputs_.clear();
    for (const torch::Tensor& input : inputs) {
      inputs_.push_back(torch::empty_like(input, device));
    }
  }

  void copy(const Tensors& inputs) {
    const torch::NoGradGuard no_grad;
    for (size_t i = 0; i < inputs.size(); ++i) {
      inputs_[i].copy_(inputs[i]);
    }
  }

  Tensors run(const Tensors& inputs) const {
    Tensors outputs = step_(inputs);
    check_place("outputs", outputs);
    for (torch::Tensor& output : outputs) {
      output = output.detach(); // lets go of what was kept for backward
    }
    return outputs;
  }

  void run_graph() {
    failed_ = true; // until all went well
    if (!captured_) {
      capture();
    }
    in_phase("replay", [this] { graph_->replay(); });
    failed_ = false;
  }

  void capture() {
    outputs_.clear(); // the graph has its own
    try {
      graph_->capture([this] { outputs_ = run(inputs_); });
    } catch (const std::exception& error) {
      graph_.reset(); // gives its memory back
      check_memory("capture", error);
      TORCH_CHECK(
          false,
          "CapturedStep::operator(): expected a step that a CUDA graph can "
          "hold, but got, while it was captured: ",
          detail::reason(error),
          " Take out of the step what waits for the GPU, pins memory or sets "
          "another stream, such as item(), cpu() and printing, or set "
          "enabled(false).");
    }
    captured_ = true;
  }

  template <class Work>
  void in_phase(const char* phase, const Work& work) const {
    try {
      work();
    } catch (const std::exception& error) {
      check_memory(phase, error);
      throw;
    }
  }

  void check_memory(const char* phase, const std::exception& error) const {
    const std::string reason = detail::reason(error);
    TORCH_CHECK_WITH(
        OutOfMemoryError,
        reason.find("out of memory") == std::string::npos,
        "CapturedStep::operator(): expected enough memory for ",
        phase,
        " on ",
        device_,
        ", but got: ",
        reason,
        " Lower what a step needs, such as its batch, or set enabled(false): a "
        "graph has memory of its own.");
  }

  torch::Device device_;
  Function step_;
  CapturedStepOptions options_;
  std::unique_ptr<detail::Graph> graph_; // none: every call is eager
  Tensors inputs_; // that a graph reads, or their kinds
  Tensors outputs_;
  int64_t calls_ = 0;
  bool captured_ = false;
  bool failed_ = false;
};

} // namespace revnet

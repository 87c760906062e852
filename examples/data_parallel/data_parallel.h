// SPDX-License-Identifier: MIT
#pragma once

// Data parallel training on c10d, the engine beneath Python's
// DistributedDataParallel. Copy it together with world.h and rendezvous.h.

#include "world.h"

#include <ATen/MemoryOverlap.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/types.h>
#include <torch/version.h>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <memory>
#include <numeric>
#include <ostream>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace parallel {

struct DataParallelOptions {
  /// Looks in each step for parameters that it does not use on this rank; their
  /// gradients stay as they are where no rank uses them.
  TORCH_ARG(bool, find_unused_parameters) = false;
  /// Every step uses the same parameters, equally often: unused ones are then
  /// found once, and a parameter may be used in several checkpoints.
  TORCH_ARG(bool, static_graph) = false;
  /// Gives all ranks the buffers of rank 0 at the beginning of each step.
  TORCH_ARG(bool, broadcast_buffers) = true;
  /// Gradients are views of the buckets, which saves their size once. Then
  /// torch::optim::Optimizer::zero_grad() throws; Module::zero_grad() works.
  TORCH_ARG(bool, gradient_as_bucket_view) = false;
  /// Fills buckets after the first step anew, in the order in which gradients
  /// came. A run that was restarted then adds in another order than one that
  /// was not, and its losses differ in the last digits.
  TORCH_ARG(bool, rebuild_buckets) = false;
  /// The size of a bucket; the first is smaller, so that communication begins
  /// early.
  TORCH_ARG(int64_t, bucket_bytes) = c10d::kDefaultBucketBytesCap;
  TORCH_ARG(int64_t, first_bucket_bytes) = c10d::kDefaultFirstBucketBytes;
};

namespace detail {

/// c10d's Reducer, whose buckets may stay as they are.
struct Reducer final : c10d::Reducer {
  using c10d::Reducer::Reducer;

  /// As after rebuild_buckets(). Not to call that would not do: each step before
  /// adds its parameters to a list.
  void keep_buckets() {
    has_rebuilt_bucket_ = true;
  }

  /// Forgets the uses that a static graph had in passes that were not averaged:
  /// c10d counts them, and would wait for as many in each later pass.
  void forget_uses() {
    for (auto& use : numGradHooksTriggeredMap_) {
      use.second = 0;
    }
  }
};

template <class>
struct IsTuple : std::false_type {};
template <class... Ts>
struct IsTuple<std::tuple<Ts...>> : std::true_type {};
template <class T, class U>
struct IsTuple<std::pair<T, U>> : std::true_type {};

/// Finds the tensors with a graph in what a forward pass returned; whether it can
/// tell.
template <class Output>
bool find_tensors(const Output& output, std::vector<Tensor>& found) {
  if constexpr (std::is_same_v<Output, Tensor>) {
    if (output.requires_grad()) {
      found.push_back(output);
    }
  } else if constexpr (std::is_same_v<Output, std::vector<Tensor>>) {
    for (const Tensor& tensor : output) {
      find_tensors(tensor, found);
    }
  } else if constexpr (IsTuple<Output>::value) {
    return std::apply(
        [&](const auto&... parts) {
          return (find_tensors(parts, found) && ...);
        },
        output);
  } else {
    return false;
  }
  return true;
}

/// The tensors of a module, each of them once.
struct State {
  explicit State(const torch::nn::Module& module) {
    for (const auto& item : module.named_parameters()) {
      if (add(item) && item.value().requires_grad()) {
        names.emplace(trained.size(), item.key());
        trained.push_back(item.value());
      }
    }
    for (const auto& item : module.named_buffers()) {
      if (add(item)) {
        buffers.push_back(item.value());
      }
    }
  }

  std::vector<Tensor> all;
  std::vector<Tensor> trained;
  std::vector<Tensor> buffers;
  std::unordered_map<size_t, std::string> names; // of those trained
  std::ostringstream description; // all that ranks must have in common

 private:
  bool add(const torch::OrderedDict<std::string, Tensor>::Item& item) {
    const Tensor& tensor = item.value();
    if (!tensor.defined() ||
        !seen_.insert(tensor.unsafeGetTensorImpl()).second) {
      return false;
    }
    TORCH_CHECK_VALUE(
        at::has_internal_overlap(tensor) != at::MemOverlap::Yes,
        "DataParallel::DataParallel(): expected memory of its own for each element "
        "of ",
        item.key(),
        ", but got strides ",
        tensor.strides(),
        ", as expand() makes them. Clone it.");
    all.push_back(tensor);
    description << item.key() << " " << tensor.sizes() << ", strides "
                << tensor.strides() << ", " << tensor.dtype() << ", "
                << tensor.device().type()
                << (tensor.requires_grad() ? ", trained\n" : "\n");
    return true;
  }

  std::unordered_set<const at::TensorImpl*> seen_;
};

template <class Embedding>
bool is_sparse(const torch::nn::Module& module) {
  const auto* found = dynamic_cast<const Embedding*>(&module);
  return found && found->options.sparse() && found->weight.requires_grad();
}

/// A bucket has dense gradients alone, and c10d names no parameter.
inline void check_dense(
    const std::string& name,
    const torch::nn::Module& module) {
  TORCH_CHECK_VALUE(
      !is_sparse<torch::nn::EmbeddingImpl>(module) &&
          !is_sparse<torch::nn::EmbeddingBagImpl>(module),
      "DataParallel::DataParallel(): expected dense gradients, but got sparse ones "
      "of the embedding \"",
      name,
      "\". Make it with sparse(false).");
}

/// What of the options ranks must have in common.
inline void describe(const DataParallelOptions& options, std::ostream& stream) {
  stream << "find_unused_parameters " << options.find_unused_parameters()
         << "\nstatic_graph " << options.static_graph()
         << "\nbroadcast_buffers " << options.broadcast_buffers()
         << "\nrebuild_buckets " << options.rebuild_buckets()
         << "\nbucket_bytes " << options.bucket_bytes()
         << "\nfirst_bucket_bytes " << options.first_bucket_bytes() << "\n";
}

} // namespace detail

/// Averages the gradients of a module over all ranks while backward runs.
///
/// Gives all ranks the parameters and buffers of rank 0 at construction. From
/// then on the module stays on its device, and the same parameters are trained.
class DataParallel final {
 public:
  DataParallel(
      const torch::nn::Module& module,
      World world,
      const DataParallelOptions& options = {})
      : world_(std::move(world)), options_(options) {
    detail::check_dense("", module);
    for (const auto& item : module.named_modules("", /*include_self=*/false)) {
      detail::check_dense(item.key(), *item.value());
    }
    detail::State state(module);
    parameters_ = state.trained;
    buffers_ = state.buffers;
    check_parameters();
    device_ = parameters_[0].device();
    for (const Tensor& parameter : parameters_) {
      accumulators_.push_back(
          torch::autograd::impl::grad_accumulator(parameter));
    }
    detail::describe(options, state.description);
    world_.require_same("module and options", state.description.str());
    world_.broadcast(state.all);
    if (world_.group) {
      make_reducer(std::move(state.names));
    }
  }

  DataParallel(const DataParallel&) = delete;
  DataParallel& operator=(const DataParallel&) = delete;

  /// Runs a forward pass and returns what it returns. The backward pass that
  /// follows leaves the average over all ranks in each gradient; without
  /// `synchronize` it leaves those of this rank, to which later passes add.
  ///
  /// All ranks make the same calls. With find_unused_parameters or static_graph,
  /// `run` returns a Tensor, a vector of them, or a tuple of these.
  template <class Run>
  auto forward(Run&& run, bool synchronize = true) {
    const bool reduce = reducer_ && torch::GradMode::is_enabled();
    if (reduce) {
      check_unchanged();
      begin();
    }
    auto output = std::forward<Run>(run)();
    if (reduce && synchronize) {
      std::vector<Tensor> tensors;
      TORCH_CHECK_TYPE(
          detail::find_tensors(output, tensors) || !needs_outputs(),
          "DataParallel::forward(): expected `run` to return a Tensor, a vector "
          "of them or a tuple of these, but got ",
          c10::demangle(typeid(output).name()),
          ". Return one, or set neither find_unused_parameters nor "
          "static_graph.");
      prepare(tensors);
    }
    if (reduce) {
      step_begins_ = synchronize;
    }
    return output;
  }

  /// Gives all ranks the buffers of rank 0: before an evaluation or checkpoint.
  void broadcast_buffers() const {
    world_.broadcast(buffers_);
  }

  /// c10d's engine, for its hooks and figures; empty in a World::alone().
  const std::shared_ptr<c10d::Reducer>& reducer() const {
    return reducer_;
  }

 private:
  bool needs_outputs() const {
    return options_.find_unused_parameters() || options_.static_graph();
  }

  void check_parameters() const {
    TORCH_CHECK_VALUE(
        !parameters_.empty(),
        "DataParallel::DataParallel(): expected a module with parameters that "
        "require a gradient, but it has none. Call it without DataParallel.");
    for (const Tensor& parameter : parameters_) {
      TORCH_CHECK_VALUE(
          parameter.device() == parameters_[0].device(),
          "DataParallel::DataParallel(): expected all trained parameters on one "
          "device, but got ",
          parameters_[0].device(),
          " and ",
          parameter.device(),
          ". Move the module to World::device().");
    }
  }

  void check_unchanged() const {
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const Tensor& parameter = parameters_[i];
      // A cast takes c10d's hook away, and nothing would be averaged.
      const bool is_cast = parameter.requires_grad() &&
          torch::autograd::impl::grad_accumulator(parameter) !=
              accumulators_[i];
      TORCH_CHECK(
          parameter.requires_grad() && parameter.device() == device_ &&
              !is_cast,
          "DataParallel::forward(): expected parameters on ",
          device_,
          " that require a gradient, as at construction, but got one on ",
          parameter.device(),
          parameter.requires_grad() ? "" : " that requires none",
          is_cast ? " that was moved or cast" : "",
          ". Make a DataParallel after moving, casting or freezing parameters.");
    }
  }

  void make_reducer(std::unordered_map<size_t, std::string> names) {
    c10d::setDebugLevelFromEnvironment(); // names in errors, if users want
    // Gradients come in about the reverse order of the parameters.
    const std::vector<Tensor> arriving(
        parameters_.rbegin(), parameters_.rend());
    std::vector<int64_t> indices(parameters_.size());
    std::iota(indices.rbegin(), indices.rend(), 0);
    auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(
        arriving,
        {static_cast<size_t>(options_.first_bucket_bytes()),
         static_cast<size_t>(options_.bucket_bytes())},
        /*expect_sparse_gradient=*/{},
        indices));
    auto reducer = std::make_shared<detail::Reducer>(
        parameters_,
        std::move(buckets),
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 7
        /*per_bucket_size_limits=*/std::vector<size_t>{},
#endif
        world_.group,
        /*expect_sparse_gradients=*/std::vector<bool>(parameters_.size()),
        options_.bucket_bytes(),
        options_.find_unused_parameters(),
        options_.gradient_as_bucket_view(),
        std::move(names),
        options_.first_bucket_bytes()
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
            ,
        /*skip_all_reduce_unused_params=*/false,
        /*use_python_reducer=*/false
#endif
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
        ,
        /*bucket_bytes_cap_list=*/std::vector<int64_t>{}
#endif
    );
    if (options_.static_graph()) {
      reducer->set_static_graph();
    }
    if (!options_.rebuild_buckets()) {
      reducer->keep_buckets();
    }
    reducer_ = std::move(reducer);
  }

  void begin() {
    // Even where buckets stay: it throws if the last step is not averaged yet.
    reducer_->rebuild_buckets();
    if (step_begins_ && options_.broadcast_buffers()) {
      broadcast_buffers();
    }
  }

  void prepare(const std::vector<Tensor>& outputs) {
    reducer_->prepare_for_forward(); // counts a pass, which has not thrown
    const bool find =
        options_.find_unused_parameters() && !options_.static_graph();
    reducer_->prepare_for_backward(find ? outputs : std::vector<Tensor>{});
    if (options_.static_graph() && !*delayed_) {
      static_cast<detail::Reducer&>(*reducer_).forget_uses();
      delay_first(outputs);
    }
  }

  /// The first backward pass of a static graph counts uses; only at its end can
  /// gradients be averaged.
  void delay_first(const std::vector<Tensor>& outputs) {
    const std::weak_ptr<c10d::Reducer> reducer = reducer_; // it may end before
    const auto hook = [delayed = delayed_, reducer](const Tensor& gradient) {
      const auto here = reducer.lock();
      if (here && !std::exchange(*delayed, true)) {
        torch::autograd::Engine::get_default_engine().queue_callback(
            [here] { here->delay_all_reduce(); });
      }
      return gradient;
    };
    for (const Tensor& output : outputs) {
      output.register_hook(hook);
    }
  }

  World world_;
  torch::Device device_ = torch::kCPU; // of the parameters
  DataParallelOptions options_;
  std::vector<Tensor> parameters_; // that are trained, each once
  // A shared_ptr to a node, or another pointer in later LibTorch.
  using Accumulator =
      decltype(torch::autograd::impl::grad_accumulator(Tensor()));
  std::vector<Accumulator> accumulators_; // of parameters_
  std::vector<Tensor> buffers_;
  std::shared_ptr<c10d::Reducer> reducer_;
  std::shared_ptr<bool> delayed_ = std::make_shared<bool>(false);
  bool step_begins_ = true;
};

} // namespace parallel

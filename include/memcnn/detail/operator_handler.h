// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/dear_operators.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/DispatchKey.h>
#include <c10/core/DispatchKeySet.h>
#include <torch/library.h>

#include <utility>

namespace memcnn::detail {

/// Stands between autograd and the kernels of dear operators: runs their calls
/// in this thread while it lives. Autograd has its node and its saved arguments
/// by then, and takes whatever results it is given.
///
/// The calls come here by kernels for DispatchKey::BackendSelect, which every
/// call passes below autograd, and for which operators on tensors have none. They
/// are registered for the few dear operators when the first handler is made;
/// without a handler a call costs some 0.1 us more from then on.
class OperatorHandler {
 public:
  /// A call: its arguments are the last values of the stack, and so will be its
  /// results.
  struct Call {
    const c10::OperatorHandle& op;
    const DearOperator& dear;
    c10::DispatchKeySet keys; // of what runs below
    torch::jit::Stack& stack;

    c10::ArrayRef<c10::IValue> arguments() const {
      return torch::jit::last(stack, op.schema().arguments().size());
    }
    c10::ArrayRef<c10::IValue> results() const {
      return torch::jit::last(stack, op.schema().returns().size());
    }
  };

  OperatorHandler() : outer_(std::exchange(current(), this)) {
    install();
  }
  OperatorHandler(const OperatorHandler&) = delete;
  OperatorHandler& operator=(const OperatorHandler&) = delete;

 protected:
  ~OperatorHandler() {
    current() = outer_;
  }

  virtual void handle(const Call& call) = 0;

  /// Runs a call as it would run without this handler. Operators that it
  /// consists of are no calls of their own.
  void run(const Call& call) const {
    const Suspended suspended;
    if (outer_ != nullptr) {
      outer_->handle(call);
    } else {
      call.op.redispatchBoxed(call.keys, &call.stack);
    }
  }

 private:
  class Suspended {
   public:
    Suspended() : handler_(std::exchange(current(), nullptr)) {}
    Suspended(const Suspended&) = delete;
    Suspended& operator=(const Suspended&) = delete;
    ~Suspended() {
      current() = handler_;
    }

   private:
    OperatorHandler* handler_;
  };

  static OperatorHandler*& current() {
    static thread_local OperatorHandler* handler = nullptr;
    return handler;
  }

  static void kernel(
      const c10::OperatorHandle& op,
      c10::DispatchKeySet keys,
      torch::jit::Stack* stack) {
    const c10::DispatchKeySet below = keys &
        c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER,
                            c10::DispatchKey::BackendSelect);
    if (current() != nullptr) {
      const DearOperator& dear = dear_operators().at(op.operator_name().name);
      current()->handle({op, dear, below, *stack});
    } else {
      op.redispatchBoxed(below, stack);
    }
  }

  static void install() {
    static const auto* const library = registered();
    (void)library;
  }

  /// Never unregistered: other threads may be in a call.
  static const torch::Library* registered() {
    auto* library = new torch::Library(
        torch::Library::IMPL,
        "aten",
        c10::DispatchKey::BackendSelect,
        __FILE__,
        __LINE__);
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const auto& [name, dear] : dear_operators()) {
      const auto op = dispatcher.findSchema({name, ""});
      // Another copy of this header, in another shared library, may have been
      // here before, and not every LibTorch has every form of attention.
      if (op && !op->hasKernelForDispatchKey(c10::DispatchKey::BackendSelect)) {
        library->impl(
            name.c_str(), torch::CppFunction::makeFromBoxedFunction<&kernel>());
      }
    }
    return library;
  }

  OperatorHandler* outer_;
};

} // namespace memcnn::detail

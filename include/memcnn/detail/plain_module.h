// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/signature.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/recording.h>

#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

namespace memcnn::detail {

/// Makes any module with forward and inverse an Invertible, with the default
/// backward step: the module as a whole is its one branch.
template <class M>
class PlainModule final : public Invertible {
  using Forward = typename forward_signature<M>::type;
  using Inverse = typename inverse_signature<M>::type;

 public:
  explicit PlainModule(std::shared_ptr<M> module)
      : module_(std::move(module)) {}

  Tensors run(Direction direction, Tensors inputs, Recording& recording)
      override {
    const bool is_forward = direction == Direction::kForward;
    return recording.run_map(
        is_forward ? 0 : 1,
        *module_,
        std::move(inputs),
        [&](const Tensors& arguments) {
          return is_forward ? call<Forward>(
                                  [&](const auto&... each) {
                                    return module_->forward(each...);
                                  },
                                  arguments,
                                  direction)
                            : call<Inverse>(
                                  [&](const auto&... each) {
                                    return module_->inverse(each...);
                                  },
                                  arguments,
                                  direction);
        });
  }

  torch::nn::Module& module() override {
    return *module_;
  }

  std::string type_name() const override {
    return module_->name();
  }

 private:
  template <class Signature, class Fn>
  Tensors call(const Fn& fn, const Tensors& inputs, Direction direction) const {
    constexpr std::ptrdiff_t kCount = Spread<Signature>::count();
    TORCH_CHECK_VALUE(
        kCount < 0 || static_cast<std::ptrdiff_t>(inputs.size()) == kCount,
        type_name(),
        "::",
        name_of(direction),
        "(): expected ",
        kCount,
        " tensors, but got ",
        inputs.size(),
        ". Let forward() and inverse() take what the other returns.");
    return pack(Spread<Signature>::call(fn, inputs));
  }

  std::shared_ptr<M> module_;
};

/// The Invertible of a held module: itself where it is one.
template <class M>
std::shared_ptr<Invertible> as_invertible(const std::shared_ptr<M>& module) {
  if constexpr (std::is_base_of_v<Invertible, M>) {
    return module;
  } else {
    return std::make_shared<PlainModule<M>>(module);
  }
}

} // namespace memcnn::detail

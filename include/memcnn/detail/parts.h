// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/ordered_dict.h>

#include <memory>
#include <string>
#include <vector>

namespace memcnn::detail {

using RegisteredTensors = torch::OrderedDict<std::string, at::Tensor>;
using RegisteredModules =
    torch::OrderedDict<std::string, std::shared_ptr<torch::nn::Module>>;

/// What a module itself has registered, where it lies. parameters(), buffers()
/// and modules() build a name and a copy of each entry, which costs more than
/// some layers do. These members are private; an explicit instantiation may
/// name them.
const RegisteredTensors& parameters_in(const torch::nn::Module& module);
const RegisteredTensors& buffers_in(const torch::nn::Module& module);
const RegisteredModules& children_in(const torch::nn::Module& module);

template <auto kParameters, auto kBuffers, auto kChildren>
struct RegisteredIn {
  friend const RegisteredTensors& parameters_in(
      const torch::nn::Module& module) {
    return module.*kParameters;
  }
  friend const RegisteredTensors& buffers_in(const torch::nn::Module& module) {
    return module.*kBuffers;
  }
  friend const RegisteredModules& children_in(const torch::nn::Module& module) {
    return module.*kChildren;
  }
};
template struct RegisteredIn<
    &torch::nn::Module::parameters_,
    &torch::nn::Module::buffers_,
    &torch::nn::Module::children_>;

/// Whether a test holds for a module or a part below it. They are met in the
/// order of modules(), a part that is registered twice twice, up to the first
/// for which it holds.
template <class Module, class Fn>
bool any_part(Module& module, const Fn& test) {
  if (test(module)) {
    return true;
  }
  for (const auto& child : children_in(module)) {
    if (any_part(*child.value(), test)) {
      return true;
    }
  }
  return false;
}

/// Calls fn with a module and every part below it, in the order of modules().
template <class Module, class Fn>
void for_each_part(Module& module, const Fn& fn) {
  any_part(module, [&](auto& part) {
    fn(part);
    return false;
  });
}

/// A module and every part below it, as modules() gives them.
inline std::vector<std::shared_ptr<torch::nn::Module>> parts_of(
    torch::nn::Module& module) {
  std::vector<std::shared_ptr<torch::nn::Module>> parts;
  for_each_part(module, [&](torch::nn::Module& part) {
    parts.push_back(part.shared_from_this());
  });
  return parts;
}

/// Whether a test holds for one of some registered tensors. Undefined ones are
/// not met, as in parameters() and buffers().
template <class Fn>
bool any_tensor(const RegisteredTensors& tensors, const Fn& test) {
  for (const auto& item : tensors) {
    if (item.value().defined() && test(item.value())) {
      return true;
    }
  }
  return false;
}

/// Whether a test holds for a parameter of a module, in the order of
/// parameters(), likewise.
template <class Fn>
bool any_parameter(const torch::nn::Module& module, const Fn& test) {
  return any_part(module, [&](const torch::nn::Module& part) {
    return any_tensor(parameters_in(part), test);
  });
}

/// Calls fn with every parameter of a module, in the order of parameters().
template <class Fn>
void for_each_parameter(const torch::nn::Module& module, const Fn& fn) {
  any_parameter(module, [&](const at::Tensor& parameter) {
    fn(parameter);
    return false;
  });
}

/// Calls fn with every buffer of a module, in the order of buffers().
template <class Fn>
void for_each_buffer(const torch::nn::Module& module, const Fn& fn) {
  for_each_part(module, [&](const torch::nn::Module& part) {
    any_tensor(buffers_in(part), [&](const at::Tensor& buffer) {
      fn(buffer);
      return false;
    });
  });
}

} // namespace memcnn::detail

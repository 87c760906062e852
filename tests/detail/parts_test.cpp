// SPDX-License-Identifier: MIT

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/detail/parts.h>
#include <torch/torch.h>

#include <memory>
#include <vector>

namespace memcnn_test {
namespace {

using memcnn::detail::any_parameter;
using memcnn::detail::for_each_buffer;
using memcnn::detail::for_each_parameter;
using memcnn::detail::parts_of;
using torch::nn::Module;

/// Every way to register something: twice, undefined, below another one, behind
/// an AnyModule.
struct AllKindsImpl : Module {
  AllKindsImpl() {
    shared = register_module("first", torch::nn::Linear(2, 3));
    register_parameter("own", torch::ones({2}));
    register_parameter("undefined", torch::Tensor(), /*requires_grad=*/false);
    register_parameter("frozen", torch::ones({3}), /*requires_grad=*/false);
    register_buffer("buffer", torch::ones({4}));
    register_buffer("no_buffer", torch::Tensor());
    register_module("again", shared);
    register_parameter("the_same", shared->weight);
    register_module("norm", torch::nn::BatchNorm2d(2));
    register_module(
        "without_statistics",
        torch::nn::BatchNorm2d(
            torch::nn::BatchNorm2dOptions(2).affine(false).track_running_stats(
                false)));
    register_module("nested", nested());
    torch::nn::ParameterDict dict;
    dict->insert("b", torch::ones({5}));
    dict->insert("a", torch::ones({6}));
    register_module("dict", dict);
  }

  torch::nn::Sequential nested() const {
    torch::nn::Sequential outer(
        torch::nn::Conv2d(1, 2, 3), torch::nn::Functional(torch::relu));
    outer->push_back("any", torch::nn::AnyModule(torch::nn::PReLU()));
    outer->push_back("shared", shared);
    return outer;
  }

  torch::nn::Linear shared{nullptr};
};
TORCH_MODULE(AllKinds);

std::vector<const void*> addresses(const std::vector<torch::Tensor>& tensors) {
  std::vector<const void*> result;
  for (const torch::Tensor& tensor : tensors) {
    result.push_back(tensor.unsafeGetTensorImpl());
  }
  return result;
}

TEST(Parts, AreThoseOfModulesInTheirOrder) {
  AllKinds module;
  EXPECT_EQ(parts_of(*module), module->modules());
}

TEST(Parts, ParametersAreThoseOfParametersInTheirOrder) {
  AllKinds module;
  std::vector<torch::Tensor> found;
  for_each_parameter(*module, [&](const torch::Tensor& parameter) {
    found.push_back(parameter);
  });
  EXPECT_EQ(addresses(found), addresses(module->parameters()));
}

TEST(Parts, BuffersAreThoseOfBuffersInTheirOrder) {
  AllKinds module;
  std::vector<torch::Tensor> found;
  for_each_buffer(
      *module, [&](const torch::Tensor& buffer) { found.push_back(buffer); });
  EXPECT_EQ(addresses(found), addresses(module->buffers()));
}

TEST(Parts, WalkEndsWhereATestHolds) {
  AllKinds module;
  int64_t met = 0;
  const auto is_frozen = [&](const torch::Tensor& parameter) {
    ++met;
    return !parameter.requires_grad();
  };
  EXPECT_TRUE(any_parameter(*module, is_frozen));
  EXPECT_EQ(met, 2); // own, frozen
  EXPECT_FALSE(any_parameter(
      *module, [](const torch::Tensor& p) { return p.dim() == 7; }));
}

TEST(Parts, ModuleThatIsReplacedIsMet) {
  AllKinds module;
  module->replace_module("first", torch::nn::Linear(4, 5));
  module->unregister_module("norm");
  EXPECT_EQ(parts_of(*module), module->modules());
}

} // namespace
} // namespace memcnn_test

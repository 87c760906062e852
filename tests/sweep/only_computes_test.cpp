// SPDX-License-Identifier: MIT
//
// Layers whose operators nobody looks at have nothing to see.

#include "layers.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/detail/module_state.h>
#include <memcnn/detail/only_computes.h>
#include <memcnn/detail/operator_watch.h>
#include <torch/torch.h>

#include <algorithm>
#include <string>
#include <vector>

namespace memcnn_test {
namespace {

using memcnn::detail::only_computes;
using memcnn::detail::only_writes_its_buffers;
using memcnn::detail::Operators;
using memcnn::detail::OperatorWatch;
using memcnn::detail::Tensors;

/// What a second run has to find as the first one did.
Tensors state_of(torch::nn::Module& layer) {
  Tensors tensors = layer.parameters();
  if (!only_writes_its_buffers(layer)) {
    const Tensors buffers = layer.buffers();
    tensors.insert(tensors.end(), buffers.begin(), buffers.end());
  }
  return tensors;
}

class LayerThatOnlyComputes : public testing::TestWithParam<Layer> {};

std::vector<Layer> layers_that_only_compute() {
  std::vector<Layer> found;
  for (const Layer& layer : layers()) {
    if (only_computes(*layer.make(4).ptr())) {
      found.push_back(layer);
    }
  }
  return found;
}

INSTANTIATE_TEST_SUITE_P(
    Layers,
    LayerThatOnlyComputes,
    testing::ValuesIn(layers_that_only_compute()),
    [](const auto& test) { return test.param.name; });

TEST_P(LayerThatOnlyComputes, WritesAndDrawsNothing) {
  std::vector<int64_t> sizes = GetParam().argument.sizes;
  std::replace(sizes.begin(), sizes.end(), int64_t{0}, int64_t{4});
  for (const bool train : {true, false}) {
    torch::nn::AnyModule layer = GetParam().make(4);
    layer.ptr()->train(train);
    const torch::Tensor argument = torch::rand(sizes);
    const Tensors state = state_of(*layer.ptr());
    OperatorWatch watch(state, torch::kCPU, Operators::kAny);
    layer.forward(argument);
    EXPECT_FALSE(watch.draws()) << "train " << train;
    for (size_t i = 0; i < state.size(); ++i) {
      EXPECT_FALSE(watch.take_before(i).defined()) << i << ", train " << train;
    }
  }
}

// A name that is spelt wrong would be looked at, and nobody would know.
TEST(OnlyComputes, TheLayersOfCommonBranches) {
  const std::vector<std::shared_ptr<torch::nn::Module>> layers = {
      torch::nn::Sequential().ptr(),
      torch::nn::Identity().ptr(),
      torch::nn::Linear(1, 1).ptr(),
      torch::nn::Flatten().ptr()};
  for (const auto& layer : layers) {
    EXPECT_TRUE(only_computes(*layer)) << layer->name();
  }
  std::vector<std::string> names;
  for (const Layer& layer : layers_that_only_compute()) {
    names.push_back(layer.name);
  }
  EXPECT_THAT(names, testing::IsSupersetOf({"Conv2d", "ReLU"}));
}

struct DerivedImpl : torch::nn::ReLUImpl {
  torch::Tensor forward(torch::Tensor x) {
    return torch::dropout(x, /*p=*/0.5, /*train=*/true);
  }
};

struct NamedLikeALayer : torch::nn::Module {
  NamedLikeALayer() : Module("torch::nn::ReLUImpl") {}
};

TEST(OnlyComputes, NoLayerThatDrawsOrWritesNorOneOfTheUsers) {
  const std::vector<std::shared_ptr<torch::nn::Module>> layers = {
      torch::nn::Dropout().ptr(),
      torch::nn::RReLU().ptr(),
      torch::nn::InstanceNorm2d(2).ptr(),
      torch::nn::Embedding(2, 2).ptr(),
      torch::nn::LSTM(2, 2).ptr(),
      torch::nn::Functional(torch::relu).ptr(),
      std::make_shared<DerivedImpl>(),
      std::make_shared<NamedLikeALayer>()};
  for (const auto& layer : layers) {
    EXPECT_FALSE(only_computes(*layer)) << layer->name();
  }
}

} // namespace
} // namespace memcnn_test

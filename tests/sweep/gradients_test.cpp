// SPDX-License-Identifier: MIT
//
// Each layer of LibTorch as F and G, in each situation, on each path: two steps
// leave the outputs, gradients, buffers and random numbers that plain ones
// leave.

#include "../support/tolerances.h"
#include "layers.h"
#include "network.h"
#include "refusals.h"
#include "situations.h"
#include "step.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;
using torch::nn::AnyModule;
using torch::nn::Sequential;

Coupling
additive(AnyModule f, AnyModule g, const memcnn::CouplingOptions& options) {
  return Coupling(std::move(f), std::move(g), options);
}

using SequentialCoupling = memcnn::AdditiveCoupling<Sequential>;
SequentialCoupling additive_of_sequentials(
    AnyModule f,
    AnyModule g,
    const memcnn::CouplingOptions& options) {
  Sequential first;
  first->push_back(std::move(f));
  Sequential second;
  second->push_back(std::move(g));
  return SequentialCoupling(first, second, options);
}

using Adapter = memcnn::AffineAdapterSigmoid<AnyModule>;
memcnn::AffineCoupling<Adapter>
affine(AnyModule f, AnyModule g, const memcnn::CouplingOptions& options) {
  return memcnn::AffineCoupling<Adapter>(
      Adapter(std::move(f), options), Adapter(std::move(g), options), options);
}

Tolerance tolerance(const Layer& layer, const Situation& situation, Path path) {
  Tolerance result{0, 0};
  if (!keeps_inputs(path)) {
    result.gradients = situation.dtype == torch::kBFloat16
        ? kGradientBFloat16
        : gradient_tolerance(situation.dtype);
  }
  // Where no gradient is recorded, as in a first run, mkldnn has another kernel
  // for it.
  if (layer.name.rfind("LSTM", 0) == 0 && situation.dtype == torch::kFloat) {
    result = {kInferenceKernelFloat32, kGradientFloat32};
  }
  return result;
}

/// RReLU draws a number for each value that is not positive. A value that is
/// rebuilt in bfloat16 can have changed its sign: then the numbers are others,
/// and backward stops.
bool may_draw_others(const Layer& layer, const Situation& situation) {
  return layer.name == "RReLU" && situation.dtype == torch::kBFloat16;
}

template <class Coupling>
void expect_like_plain(
    const Layer& layer,
    const Situation& situation,
    const MakeCoupling<Coupling>& make) {
  for (const auto& [plain, paths] : directions()) {
    const Outcome expected = outcome_on(plain, layer, situation, make);
    if (!expected.error.empty()) {
      EXPECT_TRUE(may_be_refused(layer, situation))
          << layer.name << ", " << situation.name << ": " << expected.error;
    }
    for (const Path path : paths) {
      const Outcome found = outcome_on(path, layer, situation, make);
      if (!found.error.empty() && may_draw_others(layer, situation)) {
        EXPECT_THAT(found.error, HasSubstr("to draw in backward the random"));
        continue;
      }
      EXPECT_EQ(
          difference(expected, found, tolerance(layer, situation, path)), "")
          << layer.name << ", " << situation.name << ", " << name_of(path);
    }
  }
}

class Sweep : public testing::TestWithParam<Layer> {};
class AffineSweep : public testing::TestWithParam<Layer> {};

TEST_P(Sweep, CouplingsLeaveWhatPlainOnesLeave) {
  for (const Situation& situation : situations_of(GetParam())) {
    expect_like_plain<Coupling>(GetParam(), situation, additive);
  }
}

TEST_P(Sweep, CheckpointLeavesWhatTheLayerLeaves) {
  const Layer& layer = GetParam();
  for (const Situation& situation : situations_of(layer)) {
    const auto run = [&](const auto& forward) {
      torch::manual_seed(1);
      AnyModule module = layer.make(situation.channels);
      return outcome_of(
          {*module.ptr(),
           [&](const torch::Tensor& x) {
             return forward(module, x);
           }},
          situation,
          situation.sizes(layer.argument, 1));
    };
    const Outcome expected =
        run([](AnyModule& module, const auto& x) { return module.forward(x); });
    const Outcome found = run([](AnyModule& module, const auto& x) {
      return memcnn::checkpoint(module, x);
    });
    EXPECT_EQ(
        difference(
            expected, found, tolerance(layer, situation, Path::kCheckpoint)),
        "")
        << layer.name << ", " << situation.name;
  }
}

TEST_P(AffineSweep, CouplingsLeaveWhatPlainOnesLeave) {
  for (const Situation& situation : situations_of(GetParam())) {
    expect_like_plain<memcnn::AffineCoupling<Adapter>>(
        GetParam(), situation, affine);
  }
}

TEST(SequentialSweep, CouplingsLeaveWhatPlainOnesLeave) {
  for (const Layer& layer : layers()) {
    if (layer.name == "ResNetBranch" || layer.name == "Embedding") {
      for (const Situation& situation : situations_of(layer)) {
        expect_like_plain<SequentialCoupling>(
            layer, situation, additive_of_sequentials);
      }
    }
  }
}

std::string name_of_test(const testing::TestParamInfo<Layer>& info) {
  return info.param.name;
}

INSTANTIATE_TEST_SUITE_P(
    Layers,
    Sweep,
    testing::ValuesIn(layers()),
    name_of_test);
INSTANTIATE_TEST_SUITE_P(
    Layers,
    AffineSweep,
    testing::ValuesIn(doubling_layers()),
    name_of_test);

} // namespace
} // namespace memcnn_test

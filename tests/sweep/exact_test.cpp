// SPDX-License-Identifier: MIT
//
// Note [Exact mode], rule 1, for each layer of LibTorch as F and G.

#include "../support/twins.h"
#include "layers.h"
#include "network.h"
#include "refusals.h"
#include "situations.h"
#include "step.h"

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <string>
#include <utility>

namespace memcnn_test {
namespace {

using torch::nn::AnyModule;

Coupling
exact(AnyModule f, AnyModule g, const memcnn::CouplingOptions& options) {
  return Coupling(
      std::move(f),
      std::move(g),
      memcnn::CouplingOptions(options).fractional_bits(12));
}

class ExactSweep : public testing::TestWithParam<Layer> {};

TEST_P(ExactSweep, Rule1StepsEqualPlainOnesBitForBit) {
  const Layer& layer = GetParam();
  for (const Situation& situation : situations_of(layer)) {
    if (situation.dtype == torch::kBFloat16) {
      continue; // has 8 bits
    }
    for (const auto& [plain, paths] : directions()) {
      const Outcome expected =
          outcome_on<Coupling>(plain, layer, situation, exact);
      if (!expected.error.empty()) {
        EXPECT_TRUE(may_be_refused(layer, situation))
            << layer.name << ", " << situation.name << ": " << expected.error;
      }
      for (const Path path : paths) {
        const Outcome found =
            outcome_on<Coupling>(path, layer, situation, exact);
        EXPECT_EQ(difference(expected, found, {0, 0}), "")
            << layer.name << ", " << situation.name << ", " << name_of(path);
      }
    }
  }
}

std::string name_of_test(const testing::TestParamInfo<Layer>& info) {
  return info.param.name;
}

INSTANTIATE_TEST_SUITE_P(
    Layers,
    ExactSweep,
    testing::ValuesIn(layers()),
    name_of_test);

} // namespace
} // namespace memcnn_test

// SPDX-License-Identifier: MIT

#include "support/modules.h"

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <memory>

namespace memcnn_test {
namespace {

using Coupling = memcnn::AdditiveCoupling<LinearBranch>;
using Wrapper = memcnn::InvertibleModuleWrapper<Coupling>;

Coupling coupling() {
  return Coupling(LinearBranch(2), LinearBranch(2));
}

/// Sequences and a wrapper at several depths.
struct ModelImpl final : torch::nn::Module {
  ModelImpl() {
    register_module("wrapped", wrapped);
    register_module("layers", torch::nn::Sequential(outer, wrapped));
  }
  memcnn::ReversibleSequence inner{coupling(), coupling()};
  memcnn::ReversibleSequence outer{coupling(), inner};
  Wrapper wrapped{coupling()};
};
TORCH_MODULE(Model);

TEST(Configure, ReachesSequencesOfAllDepths) {
  Model model;
  memcnn::configure(*model, [](memcnn::ReversibleSequenceOptions& options) {
    options.memory_budget(7).debug(true);
  });
  EXPECT_EQ(model->outer->options.memory_budget(), 7);
  EXPECT_EQ(model->inner->options.memory_budget(), 7);
  EXPECT_FALSE(model->wrapped->options.debug());
}

TEST(Configure, ReachesWrappers) {
  Model model;
  memcnn::configure(model, [](memcnn::InvertibleModuleWrapperOptions& options) {
    options.keep_input(true).debug(true);
  });
  EXPECT_TRUE(model->wrapped->options.keep_input());
  EXPECT_FALSE(model->outer->options.debug());
}

TEST(Configure, ReachesBothByAGenericFunction) {
  Model model;
  memcnn::configure(
      model, [](auto& options) { options.debug(true).memory_budget(7); });
  EXPECT_EQ(model->wrapped->options.memory_budget(), 7);
  EXPECT_EQ(model->inner->options.memory_budget(), 7);
  EXPECT_TRUE(model->wrapped->options.debug());
  EXPECT_TRUE(model->outer->options.debug());
  EXPECT_TRUE(model->inner->options.debug());
}

TEST(Configure, ReachesTheModelItself) {
  memcnn::ReversibleSequence sequence(coupling());
  Wrapper wrapped(coupling());
  const auto disable = [](auto& options) {
    options.disable(true);
  };
  memcnn::configure(sequence, disable);
  memcnn::configure(*wrapped, disable);
  EXPECT_TRUE(sequence->options.disable());
  EXPECT_TRUE(wrapped->options.disable());
}

} // namespace
} // namespace memcnn_test

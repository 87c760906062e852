// SPDX-License-Identifier: MIT
//
// Parameters that are not plain leaves of one use each: computed before,
// replicated, shared, with sparse gradients. All as in plain autograd.

#include "support/modules.h"
#include "support/throws_error.h"
#include "support/tolerances.h"
#include "support/twins.h"
#include "support/ways.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/nn/parallel/data_parallel.h>
#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;

using Tensors = std::vector<torch::Tensor>;

class Parameters : public testing::TestWithParam<Way> {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }
};

INSTANTIATE_TEST_SUITE_P(Ways, Parameters, saving_ways(), way_name);

// Replicas, as of torch::nn::parallel::data_parallel(): their parameters are
// computed from the original's.

struct NetImpl final : torch::nn::Cloneable<NetImpl> {
  explicit NetImpl(Way way_) : way(way_) {
    reset();
  }
  void reset() override {
    memcnn::AdditiveCoupling coupling(LinearBranch(2), LinearBranch(2));
    trunk = run_in(way, coupling);
    register_module("trunk", trunk.ptr());
    to(torch::kDouble);
  }
  torch::Tensor forward(torch::Tensor x) {
    return trunk.forward(x * 2);
  }

  Way way;
  torch::nn::AnyModule trunk;
};
TORCH_MODULE(Net);

TEST_P(Parameters, OfReplicasHaveTheGradientsOfTheWholeBatch) {
  Net net(GetParam());
  const torch::Tensor x = torch::randn({4, 4}, torch::kDouble);
  const auto expected = torch::autograd::grad(
      {net->forward(x).square().sum()}, net->parameters());

  // Two devices, elsewhere.
  const std::vector<torch::Device> devices(2, torch::Device(torch::kCPU));
  auto replicas = torch::nn::parallel::replicate(net, devices);
  const auto outputs =
      torch::nn::parallel::parallel_apply(replicas, x.chunk(2), devices);
  torch::cat(outputs).square().sum().backward();
  Tensors found;
  for (const torch::Tensor& parameter : net->parameters()) {
    found.push_back(parameter.grad());
  }
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

// Parameters that were computed before.

/// A product with a weight that may have been computed: from `root`, which is a
/// parameter as well if it is given.
struct ProductImpl final : torch::nn::Module {
  explicit ProductImpl(const torch::Tensor& weight_)
      : weight(register_parameter("weight", weight_)) {}
  ProductImpl(const torch::Tensor& root_, const torch::Tensor& weight_)
      : ProductImpl(weight_) {
    root = register_parameter("root", root_);
  }
  torch::Tensor forward(torch::Tensor x) {
    return torch::tanh(x.matmul(uses_root ? weight + root : weight));
  }

  torch::Tensor weight;
  torch::Tensor root;
  bool uses_root = false;
};
TORCH_MODULE(Product);

struct Found {
  Tensors gradients;
  int hooks = 0;
};

Found with_computed_weights(Way way) {
  torch::manual_seed(3);
  const torch::Tensor root_f = leaf({2, 2});
  const torch::Tensor root_g = leaf({2, 2});
  Product f(root_f, root_f.exp());
  Product g(root_g.exp()); // its root belongs to another module
  Found found;
  f->weight.retain_grad();
  f->weight.register_hook([&](const torch::Tensor&) { ++found.hooks; });
  const torch::Tensor x = leaf({3, 4});
  auto trunk = run_in(way, memcnn::AdditiveCoupling(f, g));
  trunk.forward(x * 1).square().sum().backward();
  found.gradients = {root_f.grad(), root_g.grad(), x.grad(), f->weight.grad()};
  return found;
}

TEST_P(Parameters, ThatWereComputedPassTheirGradientsOn) {
  const Found expected = with_computed_weights(Way::kPlain);
  const Found found = with_computed_weights(GetParam());
  EXPECT_LT(
      relative_error(found.gradients, expected.gradients), kGradientFloat64);
  EXPECT_EQ(found.hooks, 1);
}

TEST_P(Parameters, ThatAreViewsOfOneTensor) {
  const auto gradient = [](Way way) {
    torch::manual_seed(3);
    const torch::Tensor flat = leaf({8});
    const auto parts = flat.view({2, 2, 2}).unbind(); // two outputs of one node
    auto trunk = run_in(
        way, memcnn::AdditiveCoupling(Product(parts[0]), Product(parts[1])));
    trunk.forward(leaf({3, 4}) * 1).square().sum().backward();
    return flat.grad();
  };
  EXPECT_LT(
      relative_error(gradient(GetParam()), gradient(Way::kPlain)),
      kGradientFloat64);
}

void expect_error_in_backward(Way way, Product f, const std::string& words) {
  auto trunk = run_in(way, memcnn::AdditiveCoupling(f, f));
  const torch::Tensor y = trunk.forward(leaf({3, 4}) * 1);
  EXPECT_THAT(
      [&] { y.sum().backward(); }, ThrowsError<c10::Error>(HasSubstr(words)));
}

TEST_P(Parameters, ComputedFromAnotherThatIsUsedTooIsAnError) {
  const torch::Tensor root = leaf({2, 2});
  Product f(root, root.exp());
  f->uses_root = true;
  expect_error_in_backward(
      GetParam(),
      f,
      "to compute from parameters that are independent of each other, but got "
      "one that was computed from another, both of which it uses. Compute it "
      "in forward(), or let forward() use only one.");
}

TEST_P(Parameters, OtherOutputOfTheNodeOfOneIsNotForgotten) {
  const auto parts = leaf({2, 2, 2}).unbind();
  Product f(parts[0]);
  f->root = parts[1]; // not registered
  f->uses_root = true;
  expect_error_in_backward(
      GetParam(), f, "got another tensor that requires a gradient");
}

// Shared parameters.

TEST_P(Parameters, SharedByTwoBlocksHaveRightSecondDerivatives) {
  memcnn::AdditiveCoupling coupling(LinearBranch(2), LinearBranch(2));
  coupling->to(torch::kDouble);
  const torch::Tensor x = leaf({3, 4});
  Tensors sources = coupling->parameters();
  sources.push_back(x);
  const auto derivatives = [&](Way way) {
    auto first = run_in(way, coupling);
    auto second = run_in(way, coupling);
    const torch::Tensor y = second.forward(first.forward(x * 1));
    Tensors found = torch::autograd::grad(
        {y.pow(3).sum()},
        sources,
        {},
        /*retain_graph=*/true,
        /*create_graph=*/true);
    torch::Tensor norm = torch::zeros({}, torch::kDouble);
    for (const torch::Tensor& gradient : found) {
      norm = norm + gradient.square().sum();
    }
    const Tensors seconds = torch::autograd::grad({norm}, sources);
    found.insert(found.end(), seconds.begin(), seconds.end());
    return found;
  };
  EXPECT_LT(
      relative_error(derivatives(GetParam()), derivatives(Way::kPlain)),
      kGradientFloat64);
}

// Sparse gradients.

/// Adds rows of a table to its argument, and, if told, looks at all of it.
struct LookUpImpl final : torch::nn::Module {
  LookUpImpl(const torch::Tensor& table_, bool sparse_)
      : sparse(sparse_), table(register_parameter("table", table_)) {}
  torch::Tensor forward(torch::Tensor x) {
    const torch::Tensor rows = torch::tensor({4, 0, 4});
    return sparse
        ? x * torch::embedding(table, rows, -1, false, /*sparse=*/true)
        : x * table.sum(0);
  }
  bool sparse;
  torch::Tensor table;
};
TORCH_MODULE(LookUp);

TEST_P(Parameters, WithSparseAndDenseGradientsInAnyOrder) {
  for (const auto& [f_sparse, g_sparse] :
       {std::pair{true, false}, {false, true}, {true, true}}) {
    const auto gradient = [&, f = f_sparse, g = g_sparse](Way way) {
      torch::manual_seed(3);
      const torch::Tensor table = leaf({5, 2});
      auto trunk = run_in(
          way, memcnn::AdditiveCoupling(LookUp(table, f), LookUp(table, g)));
      trunk.forward(leaf({3, 4}) * 1).square().sum().backward();
      return table.grad();
    };
    const torch::Tensor expected = gradient(Way::kPlain);
    const torch::Tensor found = gradient(GetParam());
    EXPECT_EQ(found.is_sparse(), expected.is_sparse());
    EXPECT_LT(
        relative_error(found.to_dense(), expected.to_dense()),
        kGradientFloat64);
  }
}

} // namespace
} // namespace memcnn_test

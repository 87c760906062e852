// SPDX-License-Identifier: MIT
//
// Note [Freed inputs], rule by rule.

#include "../support/modules.h"
#include "../support/probes.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;
using testing::Throws;

constexpr int64_t kChannels = 6;

torch::nn::AnyModule branch() {
  torch::nn::AnyModule result(ConvBranch(kChannels / 2));
  result.ptr()->to(torch::kDouble);
  return result;
}

torch::Tensor image_leaf() {
  return leaf({2, kChannels, 5, 5});
}

class FreedInputs : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }

  Coupling coupling{branch(), branch()};
  memcnn::InvertibleModuleWrapper<Coupling> block{coupling};
};

bool is_freed(const torch::Tensor& tensor) {
  return testing::Value([&] { tensor.sum(); }, Throws<c10::Error>());
}

// Rule 1: emptied and refilled in place, with no version bump.

TEST_F(FreedInputs, Rule1ProducerThatSavedItsOutputFindsItWhole) {
  for (const auto& producer :
       std::vector<std::function<torch::Tensor(const torch::Tensor&)>>{
           [](const torch::Tensor& x) { return torch::sigmoid(x); },
           [](const torch::Tensor& x) { return torch::tanh(x); },
           [](const torch::Tensor& x) {
             return (x * 2).relu_();
           }}) {
    const torch::Tensor x = image_leaf();
    const torch::Tensor x_twin = x.detach().clone().requires_grad_();
    Chain plain({coupling});
    Chain saving = plain.twin();
    plain.plain(producer(x)).square().sum().backward();

    const torch::Tensor input = producer(x_twin);
    const torch::Tensor values = input.detach().clone();
    auto* const storage = input.storage().unsafeGetStorageImpl();
    const auto version = input._version();
    const torch::Tensor y = saving.run(Engine::kWrapper, input);
    EXPECT_TRUE(is_freed(input));
    y.square().sum().backward();

    EXPECT_EQ(input.storage().unsafeGetStorageImpl(), storage);
    EXPECT_EQ(input._version(), version);
    EXPECT_LT(relative_error(input, values), kRoundTripFloat64);
    EXPECT_LT(relative_error(x_twin.grad(), x.grad()), kGradientFloat64);
    EXPECT_LT(
        relative_error(saving.gradients(), plain.gradients()),
        kGradientFloat64);
    coupling->zero_grad();
  }
}

TEST_F(FreedInputs, Rule1ZerosOfAReluComeBackAsZeros) {
  // In float32 a rebuilt zero is a rounding error of either sign, and half of
  // those would let gradient through the ReLU.
  for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
    Chain plain({coupling});
    plain.module().to(dtype);
    const torch::Tensor x = leaf({2, kChannels, 5, 5}, torch::kFloat);
    const torch::Tensor input = torch::relu(x.to(dtype));
    const torch::Tensor values = input.detach().clone();
    const torch::Tensor y = plain.run(Engine::kWrapper, input);
    EXPECT_TRUE(is_freed(input));
    y.sum().backward();
    EXPECT_TRUE(input.eq(0).equal(values.eq(0)));
    EXPECT_TRUE(input.gt(0).equal(values.gt(0)));
    // Not the other way round: a gradient of exactly 0 is no ReLU's alone, and
    // bfloat16 has few values.
    EXPECT_FALSE((x.grad() != 0).logical_and(x <= 0).any().item<bool>());
    EXPECT_GT((x.grad() != 0).sum().item<int64_t>(), x.numel() / 4);
  }
}

TEST_F(FreedInputs, Rule1RefillsTheLayoutThatItFreed) {
  const torch::Tensor input =
      (image_leaf() * 2).to(torch::MemoryFormat::ChannelsLast);
  const torch::Tensor values = input.detach().clone();
  const auto strides = input.strides().vec();
  const torch::Tensor y = block(input);
  EXPECT_TRUE(is_freed(input));
  y.sum().backward();
  EXPECT_EQ(input.strides(), strides);
  EXPECT_LT(relative_error(input, values), kRoundTripFloat64);
}

// Rule 2: freed only where nobody else can be hurt as far as can be seen.

struct Kept {
  const char* reason;
  std::function<torch::Tensor(torch::Tensor leaf, torch::Tensor& other)> make;
};

TEST_F(FreedInputs, Rule2KeepsWhatSomebodyElseMayNeed) {
  const std::vector<Kept> cases = {
      {"a leaf",
       [](auto x, auto&) {
         return x;
       }},
      {"a view",
       [](auto x, auto&) {
         return (x * 2).view_as(x);
       }},
      {"a view",
       [](auto x, auto&) {
         return torch::cat({x, x}, 0).slice(/*dim=*/0, /*start=*/1, /*end=*/3);
       }},
      {"another tensor shares its storage",
       [](auto x, auto& other) {
         auto input = x * 2;
         other = input.detach();
         return input;
       }},
      {"another tensor shares its storage",
       [](auto x, auto& other) {
         auto input = torch::relu(x);
         other = input.view({-1});
         return input;
       }},
  };
  for (const Kept& each : cases) {
    torch::Tensor other;
    const torch::Tensor x = image_leaf();
    const torch::Tensor input = each.make(x, other);
    const torch::Tensor values = input.detach().clone();
    const torch::Tensor y = block(input);
    EXPECT_THAT(block->input_kept_because(), HasSubstr(each.reason));
    EXPECT_TRUE(input.equal(values)) << each.reason;
    y.sum().backward();
    EXPECT_TRUE(input.equal(values)) << each.reason;
  }
}

/// Owns memory that no allocator of LibTorch knows.
struct Borrow final : torch::autograd::Function<Borrow> {
  static torch::Tensor forward(
      torch::autograd::AutogradContext*,
      const torch::Tensor& like,
      double* memory) {
    return torch::from_blob(memory, like.sizes(), like.options());
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext*,
      torch::autograd::variable_list grads) {
    return {grads[0], torch::Tensor()};
  }
};

TEST_F(FreedInputs, Rule2KeepsMemoryThatBelongsToAnotherLibrary) {
  const torch::Tensor x = image_leaf();
  std::vector<double> memory(static_cast<size_t>(x.numel()), 0.5);
  const torch::Tensor input = Borrow::apply(x, memory.data());
  block(input).sum().backward();
  EXPECT_THAT(
      block->input_kept_because(), HasSubstr("belongs to another library"));
  EXPECT_EQ(memory, std::vector<double>(memory.size(), 0.5));
}

struct PassThroughImpl final : torch::nn::Cloneable<PassThroughImpl> {
  PassThroughImpl() {
    reset();
  }
  void reset() override {
    weight = register_parameter("weight", torch::ones({1}, torch::kDouble));
  }
  std::tuple<torch::Tensor, torch::Tensor> forward(
      torch::Tensor a,
      torch::Tensor b) {
    return {a, b * weight};
  }
  std::tuple<torch::Tensor, torch::Tensor> inverse(
      torch::Tensor a,
      torch::Tensor b) {
    return {a, b / weight};
  }
  torch::Tensor weight;
};
TORCH_MODULE(PassThrough);

TEST_F(FreedInputs, Rule2KeepsAnInputThatAnOutputShares) {
  memcnn::InvertibleModuleWrapper pass((PassThrough()));
  const torch::Tensor a = image_leaf() * 2;
  const torch::Tensor b = image_leaf() * 2;
  auto [same, other] = pass(a, b);
  EXPECT_THAT(
      pass->input_kept_because(), HasSubstr("an output shares its storage"));
  EXPECT_FALSE(is_freed(a));
  EXPECT_TRUE(is_freed(b));
  (same.sum() + other.sum()).backward();
  EXPECT_FALSE(is_freed(b));
}

TEST_F(FreedInputs, Rule2KnowsWhatItsOwnNodesKeep) {
  // checkpoint() and keep_input keep no output: an alias is somebody else's.
  memcnn::InvertibleModuleWrapper keeping(
      coupling, memcnn::InvertibleModuleWrapperOptions().keep_input(true));
  const std::vector<std::function<torch::Tensor()>> producers = {
      [&] { return keeping(image_leaf() * 2); },
      [&] {
        return memcnn::checkpoint(coupling, image_leaf() * 2);
      }};
  for (const auto& producer : producers) {
    const torch::Tensor input = producer();
    const torch::Tensor alias = input.detach();
    const torch::Tensor values = alias.clone();
    const torch::Tensor y = block(input);
    EXPECT_FALSE(is_freed(input));
    EXPECT_TRUE(alias.equal(values));
    const torch::Tensor alone = producer();
    const torch::Tensor z = block(alone);
    EXPECT_TRUE(is_freed(alone));
  }
}

TEST_F(FreedInputs, Rule2FreesWhatOnlyItsProducerShares) {
  const auto freed = [&](const torch::Tensor& input) {
    const torch::Tensor y = block(input);
    return is_freed(input) && block->input_kept_because().empty();
  };
  EXPECT_TRUE(freed(image_leaf() * 2));
  EXPECT_TRUE(freed((image_leaf() * 2).relu_()));
  EXPECT_TRUE(freed(torch::sigmoid(image_leaf())));
  EXPECT_TRUE(freed(block(image_leaf() * 2)));
}

// Rule 3: a read of a freed tensor is an error that says what to do.

TEST_F(FreedInputs, Rule3EveryReadNamesTheBlockAndTheCure) {
  const torch::Tensor input = image_leaf() * 2;
  const torch::Tensor y = block(input);
  const std::vector<std::function<void()>> reads = {
      [&] { input + 1; },
      [&] { input.sum(); },
      [&] { input.clone(); },
      [&] { torch::zeros_like(y).copy_(input); },
      [&] {
        input.view({-1, 5}).matmul(torch::ones({5, 2}, torch::kDouble));
      },
      [&] { input.select(0, 1).contiguous().sum(); },
      [&] {
        input.permute({1, 0, 2, 3}).contiguous();
      },
      [&] { input.chunk(2, 1)[1].mul(2); },
      [&] { torch::relu(input); },
      [&] {
        torch::conv2d(input, torch::ones({1, 6, 3, 3}, torch::kDouble));
      },
      [&] { input[0][0][0][0].item<double>(); },
      [&] { input.detach().add_(1); },
      [&] { coupling(input); },
      [&] {
        block(input);
      }};
  for (size_t i = 0; i < reads.size(); ++i) {
    EXPECT_THAT(
        reads[i],
        ThrowsError<c10::Error>(
            HasSubstr("memcnn: InvertibleModuleWrapper::forward()"),
            HasSubstr("AdditiveCoupling"),
            HasSubstr("keep_input(true)")))
        << "read " << i;
  }
  EXPECT_EQ(input.sizes(), y.sizes()); // what needs no data still works
  y.sum().backward();
  EXPECT_FALSE(is_freed(input));
}

TEST_F(FreedInputs, Rule3ErrorsOfInverseNameItsOwnOption) {
  const torch::Tensor output = image_leaf() * 2;
  const torch::Tensor x = block->inverse(output);
  EXPECT_THAT(
      [&] { output.sum(); },
      ThrowsError<c10::Error>(
          HasSubstr("InvertibleModuleWrapper::inverse()"),
          HasSubstr("keep_input_inverse(true)")));
}

TEST_F(FreedInputs, Rule3ProducerStopsBeforeItReadsFreedMemory) {
  // Backward through a sibling reaches the producer without the block's own
  // backward having run.
  for (const bool own_block : {false, true}) {
    const torch::Tensor x = image_leaf();
    const torch::Tensor input = own_block ? block(x * 2) : torch::sigmoid(x);
    const torch::Tensor sibling = input.sum();
    const torch::Tensor y = block(input);
    EXPECT_THAT(
        [&] {
          torch::autograd::grad({sibling}, {x}, {}, /*retain_graph=*/true);
        },
        ThrowsError<c10::Error>(HasSubstr("keep_input(true)")))
        << own_block;
    // The whole loss runs the block first, and all is well.
    const auto gradient = torch::autograd::grad({sibling + y.sum()}, {x});
    EXPECT_TRUE(gradient[0].defined());
  }
}

TEST_F(FreedInputs, Rule3KeepInputCures) {
  Chain plain({coupling});
  Chain twin = plain.twin();
  memcnn::InvertibleModuleWrapper keeping(
      twin.block(0), memcnn::InvertibleModuleWrapperOptions().keep_input(true));
  const torch::Tensor x = image_leaf();
  const auto residual = [&](auto&& run) {
    const torch::Tensor input = x * 2;
    const torch::Tensor y = run(input);
    return torch::autograd::grad({(y + input).square().sum()}, {x})[0];
  };
  const torch::Tensor expected =
      residual([&](auto& input) { return plain.plain(input); });
  const torch::Tensor found =
      residual([&](auto& input) { return keeping(input); });
  EXPECT_THAT(
      [&] { residual([&](auto& input) { return block(input); }); },
      ThrowsError<c10::Error>(HasSubstr("keep_input(true)")));
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

// Rule 4: failures leave tensors whole, or under rule 3.

TEST_F(FreedInputs, Rule4FailedForwardLeavesEveryTensorWhole) {
  for (const int in_run : {1, 2}) { // in F, in G
    memcnn::AdditiveCoupling failing(
        torch::nn::AnyModule(Throwing(4, in_run == 1 ? 1 : 0)),
        torch::nn::AnyModule(Throwing(4, in_run == 2 ? 1 : 0)));
    memcnn::InvertibleModuleWrapper wrapped(failing);
    const torch::Tensor input = leaf({3, 8}, torch::kFloat) * 2;
    const torch::Tensor values = input.detach().clone();
    EXPECT_THROW(wrapped(input), std::domain_error);
    EXPECT_TRUE(input.equal(values));
    wrapped(input).sum().backward(); // and the block works again
    EXPECT_LT(relative_error(input, values), kRoundTripFloat32);
  }
}

TEST_F(FreedInputs, Rule4FailedBackwardLeavesTheLibraryUsable) {
  Throwing f(4, /*throw_in_run=*/2);
  memcnn::InvertibleModuleWrapper wrapped(
      memcnn::AdditiveCoupling(f, Throwing(4, 0)));
  const torch::Tensor input = leaf({3, 8}, torch::kFloat) * 2;
  const torch::Tensor y = wrapped(input);
  EXPECT_THROW(y.sum().backward(), std::domain_error);
  EXPECT_THAT(
      [&] { input.sum(); },
      ThrowsError<c10::Error>(
          HasSubstr("memcnn"), HasSubstr("keep_input(true)")));
  const torch::Tensor again = leaf({3, 8}, torch::kFloat);
  wrapped(again * 2).sum().backward();
  EXPECT_TRUE(again.grad().defined());
}

// Rule 5: memory does not grow with the number of blocks.

struct Memory {
  int64_t held;
  int64_t peak;
};

Memory memory_of(size_t depth) {
  Chain chain = Chain::make(depth, branch);
  const torch::Tensor x = leaf({4, kChannels, 16, 16});
  int64_t gradients = 0;
  for (const torch::Tensor& parameter : chain.parameters()) {
    gradients += static_cast<int64_t>(parameter.nbytes());
  }
  memcnn::AllocationMeter meter;
  const torch::Tensor loss =
      chain.run(Engine::kWrapper, made_by_a_layer(x)).sum();
  const int64_t held = meter.held_bytes();
  loss.backward();
  return {held, meter.peak_bytes() - gradients};
}

TEST_F(FreedInputs, Rule5HeldAfterForwardIsThatOfOneBlockAtAnyDepth) {
  const auto block_bytes =
      static_cast<int64_t>(4 * kChannels * 16 * 16 * sizeof(double));
  const Memory shallow = memory_of(5);
  const Memory deep = memory_of(50);
  EXPECT_LE(std::abs(deep.held - shallow.held), block_bytes);
}

TEST_F(FreedInputs, Rule5PeakOfAStepDoesNotGrowWithDepth) {
  EXPECT_LE(
      static_cast<double>(memory_of(50).peak),
      1.05 * static_cast<double>(memory_of(5).peak));
}

} // namespace
} // namespace memcnn_test

// SPDX-License-Identifier: MIT

#include "../support/throws_error.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/detail/saved.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <functional>

namespace memcnn_test {
namespace {

using memcnn::detail::Saved;
using testing::HasSubstr;
using torch::Tensor;

TEST(Saved, SeesWritesByTheVersion) {
  const Tensor tensor = torch::ones({3});
  const Saved saved(tensor);
  EXPECT_TRUE(saved.unchanged());
  tensor.add_(1);
  EXPECT_FALSE(saved.unchanged());
  EXPECT_TRUE(saved.keeps_memory());
}

TEST(Saved, SeesOtherMemory) {
  const Tensor tensor = torch::ones({3});
  const Saved saved(tensor);
  tensor.set_data(torch::ones({3}));
  EXPECT_TRUE(saved.unchanged());
  EXPECT_FALSE(saved.keeps_memory());
}

/// The allocator hands out again first what was let go last.
TEST(Saved, SeesMemoryThatTakesThePlaceOfItsOwn) {
  for (int attempt = 0; attempt < 100; ++attempt) {
    const Tensor tensor = torch::full({3}, 0.1);
    const Saved saved(tensor);
    tensor.set_data(tensor.to(torch::kHalf));
    tensor.set_data(tensor.to(torch::kFloat));
    ASSERT_FALSE(saved.keeps_memory()) << attempt;
  }
}

TEST(Saved, HoldsNoMemoryThatATensorHasLeft) {
  const memcnn::AllocationMeter meter;
  const Tensor tensor = torch::ones({1000});
  const int64_t before = meter.held_bytes();
  const Saved saved(tensor);
  tensor.set_data(torch::ones({1}));
  EXPECT_LT(meter.held_bytes(), before);
}

TEST(Saved, ConvertedLayersStopBackward) {
  const auto to_half_and_back = [](torch::nn::Module& module) {
    module.to(torch::kHalf);
    module.to(torch::kFloat);
  };
  const auto to_double = [](torch::nn::Module& module) {
    module.to(torch::kDouble);
  };
  for (const std::function<void(torch::nn::Module&)>& convert :
       {std::function<void(torch::nn::Module&)>(to_double),
        std::function<void(torch::nn::Module&)>(to_half_and_back)}) {
    memcnn::ReversibleSequence flow(memcnn::ActNorm(4), memcnn::Conv1x1(4));
    memcnn::InvertibleModuleWrapper wrapped{memcnn::ActNorm(4)};
    const Tensor x = leaf({2, 4, 3, 3}, torch::kFloat);
    const Tensor of_flow = flow(x * 2).sum();
    const Tensor of_wrapper = wrapped->forward(x * 2).sum();
    convert(*flow);
    convert(*wrapped);
    EXPECT_THAT(
        [&] { of_flow.backward(); },
        ThrowsError<c10::Error>(
            HasSubstr("ReversibleSequence::forward(): expected its parameters "
                      "to keep their memory from forward to backward, but got "
                      "one with other memory by to(), set_data() or set_()"),
            HasSubstr("Convert the module before forward or after backward.")));
    EXPECT_THAT(
        [&] { of_wrapper.backward(); },
        ThrowsError<c10::Error>(
            HasSubstr("InvertibleModuleWrapper::forward(): expected its "
                      "parameters to keep their memory")));
  }
}

} // namespace
} // namespace memcnn_test

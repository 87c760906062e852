// SPDX-License-Identifier: MIT

#include <memcnn/allocation_meter.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace {

TEST(AllocationMeter, CountsHeldAndPeakBytes) {
  memcnn::AllocationMeter meter;
  EXPECT_EQ(meter.held_bytes(), 0);
  auto a = torch::empty({1000}); // 4000 bytes
  {
    const auto b = torch::empty({500}, torch::kFloat64); // 4000 bytes
    EXPECT_EQ(meter.held_bytes(), 8000);
  }
  EXPECT_EQ(meter.held_bytes(), 4000);
  EXPECT_EQ(meter.peak_bytes(), 8000);
  meter.reset_peak();
  EXPECT_EQ(meter.peak_bytes(), 4000);
  a.reset();
  EXPECT_EQ(meter.held_bytes(), 0);
}

TEST(AllocationMeter, IgnoresTensorsFromBeforeItStarted) {
  auto before = torch::empty({1000});
  const memcnn::AllocationMeter meter;
  before.reset();
  EXPECT_EQ(meter.held_bytes(), 0);
}

TEST(AllocationMeter, FollowsStorageThatIsEmptiedAndRefilled) {
  const memcnn::AllocationMeter meter;
  const auto tensor = torch::empty({1000});
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  storage->set_data_ptr(c10::GetAllocator(c10::kCPU)->allocate(0));
  EXPECT_EQ(meter.held_bytes(), 0);
  storage->set_data_ptr(c10::GetAllocator(c10::kCPU)->allocate(4000));
  EXPECT_EQ(meter.held_bytes(), 4000);
}

TEST(AllocationMeter, NestsAndSelectsDevices) {
  const memcnn::AllocationMeter outer;
  const auto a = torch::empty({10});
  {
    const memcnn::AllocationMeter inner;
    const memcnn::AllocationMeter cuda(torch::kCUDA);
    const auto b = torch::empty({20});
    EXPECT_EQ(outer.held_bytes(), 120);
    EXPECT_EQ(inner.held_bytes(), 80);
    EXPECT_EQ(cuda.held_bytes(), 0);
  }
  EXPECT_EQ(outer.held_bytes(), 40);
}

struct Witness {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  std::vector<torch::Tensor> tensors;
};

Witness& witness() {
  static Witness instance;
  return instance;
}

/// Allocates in backward, then differentiates another node of its kind there:
/// beyond some depth autograd goes on in threads of its own.
struct Nested : torch::autograd::Function<Nested> {
  static torch::Tensor forward(
      torch::autograd::AutogradContext* context,
      const torch::Tensor& x,
      int64_t depth) {
    context->saved_data["depth"] = depth;
    return x.clone();
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context,
      torch::autograd::variable_list gradients) {
    {
      const std::lock_guard<std::mutex> lock(witness().mutex);
      witness().threads.insert(std::this_thread::get_id());
      witness().tensors.push_back(torch::empty({1000}));
    }
    if (const auto depth = context->saved_data["depth"].toInt(); depth > 1) {
      const torch::AutoGradMode with_graph(true);
      const auto x = torch::ones({1}, torch::requires_grad());
      torch::autograd::grad({Nested::apply(x, depth - 1)}, {x});
    }
    return {gradients[0], torch::Tensor()};
  }
};

TEST(AllocationMeter, CountsInAutogradThreads) {
  const memcnn::AllocationMeter meter;
  const auto x = torch::ones({1}, torch::requires_grad());
  Nested::apply(x, 150).backward();
  EXPECT_GT(witness().threads.size(), 1U);
  const int64_t held = meter.held_bytes();
  witness().tensors.clear();
  EXPECT_EQ(held - meter.held_bytes(), 150 * 4000);
}

} // namespace

// SPDX-License-Identifier: MIT

#include "train/data/device_batches.h"
#include "train/data/batches.h"
#include "train/data/crops.h"
#include "train/data/device_images.h"
#include "train/data/images.h"
#include "train/data/normalisation.h"
#include "train/data/window.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <vector>

namespace {

using namespace training;

constexpr auto kFormat = at::MemoryFormat::ChannelsLast;

Images some_images(int64_t count) {
  torch::manual_seed(5);
  return {
      torch::randint(256, {count, 3, 32, 32}, torch::kUInt8),
      torch::randint(10, {count}, torch::kInt64)};
}

void expect_same(const Batch& found, const Batch& expected) {
  EXPECT_TRUE(torch::equal(found.images.cpu(), expected.images));
  EXPECT_TRUE(torch::equal(found.labels.cpu(), expected.labels));
  EXPECT_TRUE(found.images.is_contiguous(kFormat));
}

/// More batches than are sent at once, in passes of several, and out of order.
void expect_bits_of_the_cpu(torch::Device device) {
  const Images images = some_images(22);
  const Normalisation normalise(images.pixels);
  for (const uint64_t seed : {1, 42}) {
    for (const int64_t batch_size : {2, 7, 22}) {
      SCOPED_TRACE(testing::Message() << seed << " " << batch_size);
      TrainingBatches expected(images, normalise, batch_size, seed);
      DeviceBatches batches(
          DeviceImages(images, normalise, device, kFormat),
          TrainingCrops(images.size(), batch_size, seed),
          device);
      for (int64_t iteration = 3; iteration < 73; ++iteration) {
        batches.make_next(iteration);
        expect_same(batches.next(), expected.at(iteration));
      }
      for (const int64_t iteration : {100, 7, 8}) {
        batches.make_next(iteration);
        expect_same(batches.at(5), expected.at(5));
        expect_same(batches.next(), expected.at(iteration));
      }
    }
  }
}

TEST(DeviceBatches, HaveTheBitsOfTrainingBatches) {
  expect_bits_of_the_cpu(torch::kCPU);
}

TEST(DeviceBatchesCuda, HaveTheBitsOfTrainingBatches) {
  if (!torch::cuda::is_available()) {
    GTEST_SKIP() << "no CUDA device";
  }
  expect_bits_of_the_cpu(torch::kCUDA);
}

TEST(DeviceImages, CutAtEveryEdgeWhatTheCpuCuts) {
  const Images images = some_images(2);
  const Normalisation normalise(images.pixels);
  const DeviceImages on_device(images, normalise, torch::kCPU, kFormat);
  for (const int64_t top : {-4, 0, 4}) {
    for (const int64_t left : {-4, 1, 4}) {
      for (const bool flip : {false, true}) {
        Batch expected{
            torch::empty({1, 3, 32, 32}), images.labels.narrow(0, 1, 1)};
        copy_window(
            images.pixels[1].const_data_ptr<uint8_t>(),
            {top, left, flip},
            normalise,
            expected.images.data_ptr<float>());
        expect_same(
            on_device.cropped(
                torch::tensor({int64_t{1}, top, left, int64_t{flip}})
                    .view({4, 1})),
            expected);
      }
    }
  }
}

TEST(DeviceImages, AreWholeForEvaluation) {
  const Images images = some_images(5);
  const Normalisation normalise(images.pixels);
  const DeviceImages on_device(images, normalise, torch::kCPU, kFormat);
  const Batch batch = on_device.whole(3, 4);
  ASSERT_EQ(batch.images.size(0), 2);
  for (int64_t image = 0; image < 2; ++image) {
    Batch expected{
        torch::empty({1, 3, 32, 32}), images.labels.narrow(0, 3 + image, 1)};
    copy_window(
        images.pixels[3 + image].const_data_ptr<uint8_t>(),
        Window(),
        normalise,
        expected.images.data_ptr<float>());
    expect_same(
        {batch.images.narrow(0, image, 1).contiguous(kFormat),
         batch.labels.narrow(0, image, 1)},
        expected);
  }
}

} // namespace

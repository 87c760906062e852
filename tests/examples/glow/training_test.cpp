// SPDX-License-Identifier: MIT

// The parts of memcnn_glow: batches, steps, checkpoints, sheets of samples.

#include <memcnn/allocation_meter.h>
#include <memcnn/plain_autograd.h>
#include "glow/batches.h"
#include "glow/config.h"
#include "glow/contact_sheet.h"
#include "glow/print.h"
#include "glow/trainer.h"
#include "support/error.h"
#include "train/data/synthetic.h"
#include "train/run/checkpoint.h"
#include "train/run/run_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <png.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace {

using glow::Config;
using glow::Trainer;
using testing::HasSubstr;
using testing::Property;
using testing::Throws;

Config tiny() {
  Config config;
  config.dataset = "synthetic";
  config.levels = 2;
  config.steps = 2;
  config.width = 6;
  config.anchor_every = 1;
  config.batch_size = 4;
  config.iterations = 20;
  config.warm_up = 5;
  return config;
}

training::DataSet few_images() {
  training::SyntheticSizes sizes;
  sizes.train = 12;
  sizes.test = 6;
  return training::make_synthetic(sizes);
}

/// The losses of the steps from `first` to before `end`.
std::vector<double> losses(Trainer& trainer, int64_t first, int64_t end) {
  std::vector<double> found;
  for (int64_t i = first; i < end; ++i) {
    trainer.step(i);
    found.push_back(trainer.read().sums.loss);
  }
  return found;
}

// --- batches ----------------------------------------------------------------

TEST(GlowBatches, DependOnSeedAndIterationAlone) {
  const auto data = few_images();
  glow::Batches batches(tiny(), data, torch::kCPU);
  const auto fifth = batches.at(5);
  EXPECT_EQ(fifth.sizes(), torch::IntArrayRef({4, 3, 32, 32}));
  EXPECT_FALSE(torch::equal(batches.at(6), fifth));
  torch::rand({7});
  EXPECT_TRUE(torch::equal(batches.at(5), fifth));
  Config other = tiny();
  other.seed = 43;
  EXPECT_FALSE(
      torch::equal(glow::Batches(other, data, torch::kCPU).at(5), fifth));
}

TEST(GlowBatches, HaveEachImageOrItsMirrorImage) {
  const auto data = few_images();
  glow::Batches batches(tiny(), data, torch::kCPU);
  int64_t found = 0, mirrored = 0;
  for (int64_t i = 0; i < 3; ++i) { // one pass
    const auto pixels = glow::quantise(batches.at(i));
    for (int64_t place = 0; place < 4; ++place) {
      for (int64_t image = 0; image < 12; ++image) {
        const auto& original = data.train.pixels[image];
        found += torch::equal(pixels[place], original) ? 1 : 0;
        mirrored += torch::equal(pixels[place], original.flip(2)) ? 1 : 0;
      }
    }
  }
  EXPECT_EQ(found + mirrored, 12);
  EXPECT_GT(found, 0);
  EXPECT_GT(mirrored, 0);
}

TEST(GlowBatches, HaveTheTestImagesAsTheyAre) {
  const auto data = few_images();
  const glow::Batches batches(tiny(), data, torch::kCPU);
  const auto rest = batches.test(/*first=*/4, /*most=*/100);
  EXPECT_TRUE(
      torch::equal(glow::quantise(rest), data.test.pixels.narrow(0, 4, 2)));
  EXPECT_TRUE(torch::equal(batches.test(4, 100), rest));
}

// --- training ---------------------------------------------------------------

TEST(GlowConfig, WarmsTheLearningRateUp) {
  Config config = tiny();
  config.learning_rate = 1;
  EXPECT_DOUBLE_EQ(glow::learning_rate_at(config, 0), 0.2);
  EXPECT_DOUBLE_EQ(glow::learning_rate_at(config, 4), 1);
  EXPECT_DOUBLE_EQ(glow::learning_rate_at(config, 400), 1);
  config.warm_up = 0;
  EXPECT_DOUBLE_EQ(glow::learning_rate_at(config, 0), 1);
}

TEST(GlowTrainer, LosesAsItsPlainTwinDoes) {
  const auto data = few_images();
  memcnn::AllocationMeter meter;
  Trainer saving(tiny(), data, torch::kCPU, meter);
  const auto found = losses(saving, 0, 20);
  const memcnn::PlainAutogradGuard plain;
  Trainer twin(glow::plain_twin(tiny()), data, torch::kCPU, meter);
  const auto expected = losses(twin, 0, 20);
  for (size_t i = 0; i < 20; ++i) {
    EXPECT_NEAR(found[i], expected[i], 0.01) << "step " << i;
  }
  EXPECT_LT(found.back(), found.front()); // and learns
}

TEST(GlowTrainer, GoesOnBitForBit) {
  const auto data = few_images();
  memcnn::AllocationMeter meter;
  const Config config = tiny();
  Trainer whole(config, data, torch::kCPU, meter);
  training::RunState state;
  for (int64_t i = 0; i < 3; ++i) {
    whole.step(i);
    state.add(whole.read().sums);
  }
  const auto bytes =
      training::make_checkpoint(config, /*fingerprint=*/7, state, whole);

  Trainer resumed(config, data, torch::kCPU, meter);
  EXPECT_EQ(
      training::restore_checkpoint(bytes, "a file", config, 7, resumed)
          .iteration,
      3);
  EXPECT_EQ(losses(resumed, 3, 6), losses(whole, 3, 6));
  EXPECT_TRUE(torch::equal(resumed.sample(2), whole.sample(2)));
}

TEST(GlowTrainer, RefusesTheCheckpointOfAnotherFlow) {
  const auto data = few_images();
  memcnn::AllocationMeter meter;
  Config config = tiny();
  Trainer trainer(config, data, torch::kCPU, meter);
  const auto bytes =
      training::make_checkpoint(config, 7, training::RunState(), trainer);
  config.parametrization = "orthogonal";
  EXPECT_THAT(
      [&] {
        training::restore_checkpoint(bytes, "a file", config, 7, trainer);
      },
      Throws<support::Error>(Property(
          &support::Error::what,
          HasSubstr("expected the checkpoint a file to be of a run with "
                    "--parametrization \"orthogonal\", but it is of one with "
                    "--parametrization \"lu\". Give --fresh"))));
}

TEST(GlowTrainer, SaysWhichLossIsNotFinite) {
  memcnn::AllocationMeter meter;
  Config config = tiny();
  config.learning_rate = 1e30;
  Trainer trainer(config, few_images(), torch::kCPU, meter);
  trainer.step(0);
  trainer.step(1);
  trainer.step(2);
  const auto report = trainer.read();
  ASSERT_TRUE(report.bad_loss);
  EXPECT_FALSE(std::isfinite(*report.bad_loss));
  EXPECT_LT(report.sums.steps, 3);
}

TEST(GlowTrainer, EvaluatesTheSameEachTime) {
  memcnn::AllocationMeter meter;
  Trainer trainer(tiny(), few_images(), torch::kCPU, meter);
  const auto go_on = [](double) {
    return true;
  };
  const auto one = trainer.evaluate(go_on);
  const auto other = trainer.evaluate(go_on);
  ASSERT_TRUE(one && other);
  EXPECT_EQ(one->bits_per_dim, other->bits_per_dim);
  EXPECT_GT(one->bits_per_dim, 4);
  EXPECT_LT(one->bits_per_dim, 9);
  EXPECT_LT(one->round_trip.error, 1e-3);
  EXPECT_FALSE(trainer.evaluate([](double) { return false; }));
}

TEST(GlowTrainer, DrawsTheSameLatentsEachTime) {
  memcnn::AllocationMeter meter;
  Trainer trainer(tiny(), few_images(), torch::kCPU, meter);
  const auto samples = trainer.sample(3);
  EXPECT_EQ(samples.sizes(), torch::IntArrayRef({3, 3, 32, 32}));
  EXPECT_EQ(samples.scalar_type(), torch::kUInt8);
  EXPECT_TRUE(torch::equal(trainer.sample(3), samples));
}

TEST(GlowPrint, WarnsWhereAFlowIsNotUndone) {
  glow::Evaluation evaluation;
  evaluation.round_trip = {0.002, {1e-6, 3e-3}};
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  glow::print_evaluation(/*iteration=*/5, evaluation);
  EXPECT_EQ(
      testing::internal::GetCapturedStdout(),
      "iteration:5 test_bits_per_dim:0.0000 reconstruction_error:2.0e-03 "
      "drift:1.0e-06,3.0e-03\n");
  EXPECT_THAT(
      testing::internal::GetCapturedStderr(),
      HasSubstr("warning: images of iteration 5 come back with errors up to "
                "2.0e-03: what the flow rebuilds, and its gradients, lose "
                "digits. Give a lower --anchor-every, or --parametrization "
                "orthogonal\n"));
  evaluation.round_trip.error = 1e-3;
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  glow::print_evaluation(5, evaluation);
  testing::internal::GetCapturedStdout();
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
}

// --- sheets -----------------------------------------------------------------

torch::Tensor read_png(const std::string& bytes) {
  png_image header = {};
  header.version = PNG_IMAGE_VERSION;
  EXPECT_NE(
      png_image_begin_read_from_memory(&header, bytes.data(), bytes.size()), 0);
  header.format = PNG_FORMAT_RGB;
  const auto pixels = torch::empty(
      {static_cast<int64_t>(header.height),
       static_cast<int64_t>(header.width),
       3},
      torch::kUInt8);
  EXPECT_NE(
      png_image_finish_read(&header, nullptr, pixels.data_ptr(), 0, nullptr),
      0);
  return pixels.permute({2, 0, 1});
}

TEST(ContactSheet, HasEachImageInItsPlace) {
  torch::manual_seed(1);
  const auto images = torch::randint(256, {5, 3, 4, 6}).to(torch::kUInt8);
  const auto sheet = glow::contact_sheet(images, /*columns=*/3);
  EXPECT_EQ(sheet.sizes(), torch::IntArrayRef({3, 2 * 6 + 2, 3 * 8 + 2}));
  const auto fifth = sheet.narrow(1, 8, 4).narrow(2, 10, 6);
  EXPECT_TRUE(torch::equal(fifth, images[4]));
  EXPECT_EQ(sheet[0][0][0].item<int64_t>(), 240);
}

TEST(ContactSheet, IsWhatAReaderOfItsPngFinds) {
  torch::manual_seed(2);
  const auto sheet = torch::randint(256, {3, 9, 14}).to(torch::kUInt8);
  const std::string bytes = glow::png_of(sheet);
  EXPECT_EQ(bytes.substr(0, 4), "\x89PNG");
  EXPECT_TRUE(torch::equal(read_png(bytes), sheet));
}

TEST(ContactSheet, RejectsAnEmptyImage) {
  EXPECT_THAT(
      [] {
        glow::png_of(torch::empty({3, 0, 4}, torch::kUInt8));
      },
      Throws<support::Error>(Property(
          &support::Error::what,
          HasSubstr("expected libpng to write an image of 4 x 0 pixels, but "
                    "got: "))));
}

} // namespace

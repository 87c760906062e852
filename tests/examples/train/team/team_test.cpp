// SPDX-License-Identifier: MIT

// What processes share of a run: batches, evaluation, agreement. Here they are
// pretended, one after the other; distributed_test.cpp has true ones.

#include "train/team/team.h"
#include <memcnn/allocation_meter.h>
#include "train/base/config.h"
#include "train/data/batches.h"
#include "train/data/device_batches.h"
#include "train/data/normalisation.h"
#include "train/data/slice.h"
#include "train/data/synthetic.h"
#include "train/run/agreement.h"
#include "train/step/largest_memory.h"
#include "train/step/trainer.h"
#include "train/team/alone.h"
#include "train/team/join.h"
#include "train/team/leave.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace training;
using testing::HasSubstr;

/// What was summed and said, by the number of the call.
struct Talk {
  std::vector<torch::Tensor> sums;
  std::vector<std::string> texts; // by rank
};

/// One of several processes that run one after the other: the last one knows
/// what all of them get.
class PretendedTeam final : public Team {
 public:
  PretendedTeam(int64_t rank, int64_t size, Talk& talk)
      : rank_(rank), size_(size), talk_(talk) {}

  int64_t rank() const override {
    return rank_;
  }

  int64_t size() const override {
    return size_;
  }

  std::string backend() const override {
    return "pretended";
  }

  int stop_signal() const override {
    return 0;
  }

  bool is_of_lost_process(const std::exception& error) const override {
    return std::string(error.what()) == "lost\nand more";
  }

  std::unique_ptr<GradientAverage> average_gradients(
      torch::nn::Module& network) override {
    return alone().average_gradients(network);
  }

  Pending begin_sum(const torch::Tensor& values) override {
    if (calls_ == talk_.sums.size()) {
      talk_.sums.push_back(torch::zeros_like(values));
    }
    return [sum = talk_.sums[calls_++].add_(values)] {
      return sum;
    };
  }

  std::string from_leader(const std::string& bytes) override {
    return bytes;
  }

  std::vector<std::string> from_all(const std::string& bytes) override {
    talk_.texts.resize(static_cast<size_t>(size_));
    talk_.texts[static_cast<size_t>(rank_)] = bytes;
    return talk_.texts;
  }

 private:
  int64_t rank_;
  int64_t size_;
  Talk& talk_;
  size_t calls_ = 0;
};

DataSet small_data() {
  SyntheticSizes sizes;
  sizes.train = 30;
  sizes.test = 450; // batches of 200, 200 and 50
  return make_synthetic(sizes);
}

TEST(Slice, TogetherIsTheWholeBatchBitForBit) {
  const Images images = small_data().train;
  const Normalisation normalise(images.pixels);
  constexpr int64_t kBatchSize = 12;
  const DeviceImages on_device(
      images, normalise, torch::kCPU, at::MemoryFormat::Contiguous);
  TrainingBatches whole(images, normalise, kBatchSize, /*seed=*/5);
  for (const int64_t ranks : {1, 2, 3, 12}) {
    for (const int64_t iteration : {0, 1, 7}) { // of several passes
      std::vector<torch::Tensor> pixels, labels;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const Slice slice{rank, ranks};
        const Batch host =
            TrainingBatches(images, normalise, kBatchSize, 5, slice)
                .at(iteration);
        const Batch device =
            DeviceBatches(
                on_device,
                TrainingCrops(images.size(), kBatchSize, 5, slice),
                torch::kCPU)
                .at(iteration);
        EXPECT_EQ(host.labels.numel(), kBatchSize / ranks);
        EXPECT_TRUE(torch::equal(host.images, device.images));
        EXPECT_TRUE(torch::equal(host.labels, device.labels));
        pixels.push_back(host.images);
        labels.push_back(host.labels);
      }
      const Batch expected = whole.at(iteration);
      EXPECT_TRUE(torch::equal(torch::cat(pixels), expected.images));
      EXPECT_TRUE(torch::equal(torch::cat(labels), expected.labels));
    }
  }
}

TEST(SharedEvaluation, IsThatOfOneProcess) {
  const DataSet data = small_data();
  Config config;
  config.model = "resnet32";
  config.dataset = "synthetic";
  config.batch_size = 12;
  memcnn::AllocationMeter meter;
  const auto evaluation_by = [&](Team& team) {
    Trainer trainer(config, data, torch::kCPU, meter, std::nullopt, team);
    return trainer.evaluate([](double) { return true; }).value();
  };
  const Evaluation expected = evaluation_by(alone());
  for (const int64_t ranks : {2, 3, 4}) { // of four, one has no batch
    Talk talk;
    Evaluation found;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      PretendedTeam team(rank, ranks, talk);
      found = evaluation_by(team);
    }
    EXPECT_EQ(found.loss, expected.loss);
    EXPECT_EQ(found.accuracy, expected.accuracy);
    EXPECT_EQ(found.top5, expected.top5);
    ASSERT_EQ(found.classes.size(), expected.classes.size());
    for (size_t i = 0; i < found.classes.size(); ++i) {
      EXPECT_EQ(found.classes[i].images, expected.classes[i].images);
      EXPECT_EQ(found.classes[i].hits, expected.classes[i].hits);
    }
  }
}

TEST(LargestMemory, IsThatOfTheProcessThatTakesTheMost) {
  Talk talk;
  MemoryUse largest;
  for (int64_t rank = 0; rank < 3; ++rank) {
    PretendedTeam team(rank, 3, talk);
    largest = largest_of_all({10 + rank, 20 - rank}, team);
  }
  EXPECT_EQ(largest.held_after_forward, 12);
  EXPECT_EQ(largest.peak, 20);
  EXPECT_EQ(largest_of_all({1, 2}, alone()).peak, 2);
}

// --- agreement --------------------------------------------------------------

/// What rank 1 throws where it has changed something of the configuration.
template <class Change>
std::string disagreement(const Change& change) {
  Talk talk;
  Config config;
  config.model = "revnet38";
  config.dataset = "cifar10";
  PretendedTeam first(0, 2, talk), second(1, 2, talk);
  talk.texts.assign(2, training::detail::common_settings(config).dump());
  agree_on_options(config, first);
  change(config);
  try {
    agree_on_options(config, second);
  } catch (const SharedError& error) {
    return error.what();
  }
  return "";
}

TEST(Agreement, NamesTheOptionThatDiffers) {
  const auto message = [](const std::string& leads,
                          const std::string& follows) {
    return "expected the same options for all processes, but rank 0 has " +
        leads + " and rank 1 has " + follows + ". Start them with one command.";
  };
  EXPECT_EQ(disagreement([](Config& config) { config.threads = 3; }), "");
  EXPECT_EQ(
      disagreement([](Config& config) { config.seed = 3; }),
      message("--seed 42", "--seed 3"));
  EXPECT_EQ(
      disagreement([](Config& config) { config.use_cuda = false; }),
      message("no --no-cuda", "--no-cuda"));
  EXPECT_EQ(
      disagreement([](Config& config) { config.model = "revnet110"; }),
      message("MODEL \"revnet38\"", "MODEL \"revnet110\""));
  EXPECT_EQ(
      disagreement([](Config& config) { config.memory_budget = 4; }),
      message("--memory-budget 0", "--memory-budget 4"));
  EXPECT_EQ(
      disagreement([](Config& config) { config.load_weights = "a.pt"; }),
      message("--load-weights \"\"", "--load-weights \"a.pt\""));
}

TEST(Agreement, RejectsOtherImages) {
  Talk talk;
  talk.texts = {"0000001f", ""};
  PretendedTeam team(1, 2, talk);
  agree_on_images(Config(), 0x1f, team);
  try {
    agree_on_images(Config(), 0x20, team);
    ADD_FAILURE();
  } catch (const SharedError& error) {
    EXPECT_THAT(
        error.what(),
        HasSubstr("rank 0 has read some with checksum 0000001f and rank 1 with "
                  "00000020. Give each machine the same files."));
  }
}

// --- beginning and end ------------------------------------------------------

TEST(JoinTeam, NamesThePackageWhereGloosHeadersWereNotFound) {
  // This program is built without them, wherever they are.
  Config config;
  config.distributed = true;
  try {
    join_team(config);
    ADD_FAILURE();
  } catch (const support::Error& error) {
    EXPECT_STREQ(
        error.what(),
        "expected a program built with the headers of gloo for --distributed, "
        "but they were not found then. Install them (Debian and Ubuntu: apt-get "
        "install libgloo-dev), and configure and build again.");
  }
}

TEST(Leave, SaysOnceWhatAllMeet) {
  Talk talk;
  const SharedError shared("of all");
  const support::Error own("of one");
  const std::runtime_error lost("lost\nand more");
  PretendedTeam first(0, 2, talk), second(1, 2, talk);
  EXPECT_EQ(
      training::detail::last_words(&first, 0, shared),
      "memcnn_train: of all\n");
  EXPECT_EQ(training::detail::last_words(&second, 1, shared), "");
  EXPECT_EQ(
      training::detail::last_words(nullptr, 0, own), "memcnn_train: of one\n");
  EXPECT_EQ(
      training::detail::last_words(&second, 1, own),
      "memcnn_train: rank 1: of one\n");
  EXPECT_EQ(training::detail::last_words(&second, 1, lost), "");
  EXPECT_EQ(
      training::detail::last_words(&first, 0, lost),
      "memcnn_train: expected the other processes to go on, but one of them has "
      "ended or does not answer (lost). See what it or torchrun has printed. "
      "The same command goes on from the last checkpoint.\n");
}

TEST(Leave, SaysOnEachMachineWhatAllMeetBeforeTheyKnowOfEachOther) {
  const SharedError shared("of all");
  ::setenv("LOCAL_RANK", "0", /*overwrite=*/1);
  EXPECT_EQ(
      training::detail::last_words(nullptr, 4, shared),
      "memcnn_train: rank 4: of all\n");
  ::setenv("LOCAL_RANK", "1", /*overwrite=*/1);
  EXPECT_EQ(training::detail::last_words(nullptr, 5, shared), "");
  ::unsetenv("LOCAL_RANK");
}

} // namespace

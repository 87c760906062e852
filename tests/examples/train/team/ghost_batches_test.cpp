// SPDX-License-Identifier: MIT

// What several processes compute, beside one that takes each batch in parts: as
// everywhere, BatchNorm's statistics are of the part alone ("ghost batches").

#include "examples/train/distributed_run.h"
#include "revnet/fused_sgd.h"
#include "train/base/config.h"
#include "train/data/batches.h"
#include "train/data/normalisation.h"
#include "train/data/slice.h"
#include "train/data/synthetic.h"
#include "train/step/learner.h"
#include "train/step/loss.h"
#include "train/step/network.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

namespace {

using namespace training;

/// The losses of steps that take each batch as slices, one after the other.
std::vector<double> losses_in_slices(const Config& config, int64_t slices) {
  const Images images = make_synthetic().train;
  const Normalisation normalise(images.pixels);
  auto network = make_network(config, /*num_classes=*/10, slices);
  revnet::FusedSgd optimizer(
      network->parameters(), training::detail::optimizer_options(config));
  std::vector<double> losses;
  for (int64_t i = 0; i < config.iterations; ++i) {
    optimizer.set_lr(learning_rate_at(config, i));
    optimizer.zero_grad();
    double loss = 0;
    for (int64_t rank = 0; rank < slices; ++rank) {
      const Batch slice = TrainingBatches(
                              images,
                              normalise,
                              config.batch_size,
                              config.seed,
                              Slice{rank, slices})
                              .at(i);
      const torch::Tensor part = loss_of(
                                     network->forward(slice.images.contiguous(
                                         memory_format_of(config))),
                                     slice.labels) /
          slices;
      part.backward();
      loss += part.item<double>();
    }
    optimizer.step();
    losses.push_back(loss);
  }
  return losses;
}

class GhostBatches : public DistributedTest {
 protected:
  std::vector<double> losses(int ranks, const std::string& arguments) {
    const auto results =
        run(ranks, arguments + " --test-images 8 --results-dir here");
    EXPECT_EQ(results[0].exit_code, 0) << results[0].err;
    std::vector<double> found;
    for (const Json& row : log_of("here")) {
      found.push_back(row.at("loss"));
    }
    return found;
  }

  static Config config() {
    torch::set_num_threads(1);
    Config config;
    config.model = "revnet38";
    config.dataset = "synthetic";
    config.batch_size = 12;
    config.iterations = 6;
    return config;
  }
};

TEST_F(GhostBatches, OfTwoProcessesHaveTheSameBits) {
  EXPECT_EQ(
      losses(2, "revnet38 synthetic --iterations 6"),
      losses_in_slices(config(), 2));
}

TEST_F(GhostBatches, OfThreeProcessesAddInAnotherOrder) {
  const auto found = losses(3, "revnet38 synthetic --iterations 6");
  const auto expected = losses_in_slices(config(), 3);
  ASSERT_EQ(found.size(), expected.size());
  EXPECT_NEAR(found[0], expected[0], 1e-6); // before the first update
  for (size_t i = 1; i < found.size(); ++i) {
    EXPECT_NEAR(found[i], expected[i], 1e-2) << i;
  }
}

} // namespace

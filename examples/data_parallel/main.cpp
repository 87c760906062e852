// SPDX-License-Identifier: MIT

// Trains a RevNet in one process, or in as many as torchrun starts:
//
//   data_parallel
//   torchrun --standalone --nproc-per-node 2 --no-python data_parallel
//
// A batch has two parts, which one process takes one after the other and two take
// at once: the same images, normalised in the same parts, make the same losses.

#include "data_parallel.h"
#include "images.h"
#include "revnet.h"

#include <torch/torch.h>

#include <cstdlib>
#include <exception>
#include <iostream>

constexpr int64_t kSteps = 20;
constexpr int64_t kParts = 2; // of a batch; the number of processes divides it
constexpr int64_t kPartSize = 16; // images, which are normalised together
constexpr double kLearningRate = 0.1;
constexpr double kMomentum = 0.9; // lets so high a rate be stable

/// The same images on whichever rank asks for them.
Images draw_part(const Images& images, int64_t step, int64_t part) {
  torch::manual_seed(step * kParts + part);
  return random_batch(images, kPartSize);
}

void train(const parallel::World& world) {
  TORCH_CHECK_VALUE(
      kParts % world.size == 0,
      "expected a number of processes that divides the ",
      kParts,
      " parts of a batch, but got ",
      world.size,
      ". Start torchrun with --nproc-per-node 2.");
  torch::manual_seed(0); // the same images on all ranks, with the same weights
  const Images images = load_images("", world.device()).train;
  revnet::RevNet net(revnet::named("revnet38"));
  net->to(world.device());
  parallel::DataParallel parallel(*net, world);
  torch::optim::SGD optimizer(
      net->parameters(),
      torch::optim::SGDOptions(kLearningRate).momentum(kMomentum));

  const int64_t parts = kParts / world.size; // of each rank
  for (int64_t step = 1; step <= kSteps; ++step) {
    optimizer.zero_grad();
    torch::Tensor mean = torch::zeros({}, world.device());
    for (int64_t i = 0; i < parts; ++i) {
      const Images part = draw_part(images, step, world.rank * parts + i);
      const torch::Tensor logits = parallel.forward(
          [&] { return net(part.input()); }, /*synchronize=*/i == parts - 1);
      const auto loss = torch::cross_entropy_loss(logits, part.labels) / parts;
      loss.backward(); // after the last part all ranks have the average
      mean += loss.detach() / world.size;
    }
    optimizer.step(); // the same on all ranks, so that weights stay the same
    mean = world.sum(mean);
    if (world.rank == 0) {
      std::cout << "step:" << step << " loss:" << mean.item<float>()
                << std::endl;
    }
  }
}

int main() {
  // As many as torchrun gives a process: others add in another order.
  torch::set_num_threads(1);
  try {
    train(parallel::World::join_or_alone());
  } catch (const std::exception& error) {
    // torchrun ends the other processes when this one fails.
    const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
    std::cerr << "data_parallel: "
              << (torch_error ? torch_error->what_without_backtrace()
                              : error.what())
              << std::endl;
    return EXIT_FAILURE;
  }
}

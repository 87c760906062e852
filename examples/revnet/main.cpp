// SPDX-License-Identifier: MIT

// Trains a network on images, and says what it holds for backward:
//
//   revnet [NETWORK] [STEPS] [FOLDER]
//
// NETWORK is one of revnet::names(); the images are those of CIFAR-10 in FOLDER
// (its binary version), or drawn.

#include "captured_step.h"
#include "fused_sgd.h"
#include "images.h"
#include "revnet.h"

#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <string>
#include <system_error>
#include <vector>

using namespace std::chrono_literals;

constexpr int64_t kBatchSize = 32; // noisy enough to regularise
constexpr double kLearningRate = 0.1; // at first; falls to 0 along a cosine
constexpr double kMomentum = 0.9; // lets so high a rate be stable
constexpr double kWeightDecay = 2e-4; // of every parameter, as in the papers

/// The share of images that are classified right.
double accuracy(const torch::Tensor& logits, const torch::Tensor& labels) {
  return (logits.argmax(1) == labels).to(torch::kFloat64).mean().item<double>();
}

double evaluate(revnet::RevNet& net, const Images& images) {
  const torch::NoGradGuard no_grad;
  net->eval();
  std::vector<torch::Tensor> logits;
  for (const Images& batch : images.split(kBatchSize)) {
    logits.push_back(net(batch.input()));
  }
  return accuracy(torch::cat(logits), images.labels);
}

/// Mebibytes that a network holds between forward and backward of a batch.
double held_by(revnet::RevNet net) {
  const memcnn::AllocationMeter meter;
  const torch::Tensor logits = net(torch::randn({kBatchSize, 3, 32, 32}));
  return static_cast<double>(meter.held_bytes()) / (1024 * 1024);
}

void train(revnet::RevNet& net, const Images& images, int64_t steps) {
  revnet::FusedSgd optimizer(
      net->parameters(),
      torch::optim::SGDOptions(kLearningRate)
          .momentum(kMomentum)
          .weight_decay(kWeightDecay));
  revnet::CapturedStep step(images.labels.device(), [&](const auto&) {
    const Images batch = random_batch(images, kBatchSize);
    const auto logits = net(batch.input()); // keeps little for backward
    const auto loss = torch::cross_entropy_loss(logits, batch.labels);
    optimizer.zero_grad();
    loss.backward(); // computes again what it needs, from the last block back
    optimizer.step();
    return std::vector<torch::Tensor>{loss, logits, batch.labels};
  });
  for (int64_t i = 1; i <= steps; ++i) {
    const auto start = std::chrono::steady_clock::now();
    optimizer.set_lr(kLearningRate * (1 + std::cos(M_PI * i / steps)) / 2);
    const auto& outputs = step(); // on a GPU soon one graph
    if (i % 10 == 0) {
      const auto loss = outputs[0].item<double>(); // waits for a GPU
      const auto time = std::chrono::steady_clock::now() - start;
      std::cout << "step:" << i << " loss:" << loss
                << " accuracy:" << accuracy(outputs[1], outputs[2])
                << " ms:" << time / 1ms << std::endl;
    }
  }
}

int64_t steps_from(const std::string& text) {
  constexpr int64_t kMost = 1000000000;
  int64_t steps = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, steps);
  TORCH_CHECK_VALUE(
      error == std::errc() && rest == end && steps >= 1 && steps <= kMost,
      "expected STEPS from 1 to ",
      kMost,
      ", but got ",
      text,
      ".");
  return steps;
}

int main(int argc, char** argv) {
  try {
    const std::string name = argc > 1 ? argv[1] : "revnet38";
    const int64_t steps = argc > 2 ? steps_from(argv[2]) : 150;
    auto options = revnet::named(name);
    torch::manual_seed(1);
    const torch::Device device(torch::cuda::is_available() ? "cuda" : "cpu");
    const DataSet data = load_images(argc > 3 ? argv[3] : "", device);
    revnet::RevNet net(options);
    net->to(device);
    train(net, data.train, steps);
    std::cout << "test_accuracy:" << evaluate(net, data.test) << "\n";
    std::cout << "held_mib:" << held_by(revnet::RevNet(options));
    const memcnn::PlainAutogradGuard plain;
    std::cout << " held_mib_if_plain:" << held_by(revnet::RevNet(options))
              << "\n";
  } catch (const c10::Error& error) {
    std::cerr << "revnet: " << error.what_without_backtrace()
              << "\nusage: revnet [NETWORK] [STEPS] [FOLDER]\n";
    return EXIT_FAILURE;
  }
}

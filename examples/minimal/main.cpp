// SPDX-License-Identifier: MIT
//
// The quick start: an additive coupling of two small branches, wrapped so that
// its output is all that waits for backward.

#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstdlib>
#include <iostream>

// Any module that maps a tensor to one of the same sizes can be a branch.
struct ExampleOperationImpl : torch::nn::Module {
  explicit ExampleOperationImpl(int64_t channels)
      : layers(register_module(
            "layers",
            torch::nn::Sequential(
                torch::nn::Conv2d(
                    torch::nn::Conv2dOptions(channels, channels, 3).padding(1)),
                torch::nn::BatchNorm2d(channels),
                torch::nn::ReLU(torch::nn::ReLUOptions().inplace(true))))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    return layers->forward(x);
  }

  torch::nn::Sequential layers;
};
TORCH_MODULE(ExampleOperation);

int main() {
  torch::manual_seed(0);
  torch::Tensor x = torch::rand({2, 10, 8, 8});

  // Ten channels: each branch works on half of them.
  memcnn::AdditiveCoupling coupling(ExampleOperation(5), ExampleOperation(5));

  if (!memcnn::is_invertible_module(coupling, {2, 10, 8, 8})) {
    std::cerr << "the coupling is not invertible\n";
    return EXIT_FAILURE;
  }

  // forward() and inverse() free, until backward, an input that a layer made:
  // here y, which is read again below. A batch such as x is never freed.
  memcnn::InvertibleModuleWrapper block(
      coupling,
      memcnn::InvertibleModuleWrapperOptions().keep_input_inverse(true));

  torch::Tensor y = block(x);
  torch::Tensor x_again = block->inverse(y);
  y.mean().backward();

  const bool same = torch::allclose(x, x_again, /*rtol=*/1e-5, /*atol=*/1e-6);
  std::cout << block << "\n"
            << "largest difference after the round trip: "
            << (x - x_again).abs().max().item<float>() << "\n"
            << (same ? "inverse(forward(x)) == x" : "the round trip failed")
            << "\n";
  return same ? EXIT_SUCCESS : EXIT_FAILURE;
}

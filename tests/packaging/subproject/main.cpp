// SPDX-License-Identifier: MIT
#include <memcnn/memcnn.h>

#include <torch/nn/modules/conv.h>
#include <torch/types.h>

#include <iostream>

torch::Tensor round_trip(const torch::Tensor& input); // in other.cpp

int main() {
  const torch::Tensor input = torch::rand({2, 4, 8, 8});

  memcnn::AdditiveCoupling coupling(
      torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 2, 3).padding(1)),
      torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 2, 3).padding(1)));
  const torch::Tensor here = coupling->inverse(coupling->forward(input));

  if (!torch::allclose(here, input, 1e-5, 1e-5) ||
      !torch::allclose(round_trip(input), input, 1e-5, 1e-5)) {
    std::cerr << "the input was not recovered\n";
    return 1;
  }
  return 0;
}

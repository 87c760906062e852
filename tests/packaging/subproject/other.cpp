// SPDX-License-Identifier: MIT
#include <memcnn/memcnn.h>

#include <torch/nn/modules/conv.h>
#include <torch/types.h>

torch::Tensor round_trip(const torch::Tensor& input) {
  memcnn::AdditiveCoupling coupling(
      torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 2, 3).padding(1)),
      torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 2, 3).padding(1)));
  return coupling->inverse(coupling->forward(input));
}

// SPDX-License-Identifier: MIT
//
// All of memcnn, for a compiler that is asked to warn of everything, in a project
// that has macros of names which the standard library has, too.

#include <torch/torch.h>

#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))

#include <memcnn/memcnn.h>

int main() {
  using torch::nn::Linear;
  memcnn::AdditiveCoupling additive(Linear(2, 2), Linear(2, 2));
  memcnn::AffineCoupling naive(
      memcnn::AffineAdapterNaive(Linear(2, 2)),
      memcnn::AffineAdapterNaive(Linear(2, 2)));
  memcnn::AffineCoupling sigmoid(
      memcnn::AffineAdapterSigmoid(Linear(2, 4)),
      memcnn::AffineAdapterSigmoid(Linear(2, 4)));
  memcnn::InvertibleModuleWrapper wrapper(
      naive, memcnn::InvertibleModuleWrapperOptions().memory_budget(1 << 10));
  memcnn::ReversibleSequence sequence(
      additive,
      sigmoid,
      memcnn::ReversibleSequenceOptions().memory_budget(1 << 10));
  const at::Tensor x = at::ones({2, 4});
  const at::Tensor y = memcnn::checkpoint(Linear(4, 4), wrapper(sequence(x)));
  y.sum().backward();
  return memcnn::is_invertible_module(additive, {2, 4}) ? 0 : 1;
}

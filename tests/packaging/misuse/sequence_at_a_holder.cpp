// SPDX-License-Identifier: MIT
//
// Must not compile: a block is asked for by the type of its holder.

#include <memcnn/sequence.h>

struct ScaleImpl : torch::nn::Module {
  at::Tensor forward(at::Tensor x) {
    return x * 2;
  }
  at::Tensor inverse(at::Tensor y) {
    return y / 2;
  }
};
TORCH_MODULE(Scale);

int main() {
  memcnn::ReversibleSequence sequence{Scale()};
  sequence->at<Scale>(0);
}

// SPDX-License-Identifier: MIT
#pragma once

#include "revnet/captured_step.h"

#include <gtest/gtest.h>
#include <torch/cuda.h>

namespace memcnn_test {

/// Tests of CUDA graphs, skipped where there are none. A SetUp() of one's own
/// calls this one first.
class CudaGraphTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) {
      GTEST_SKIP() << "no CUDA device";
    }
    if (!revnet::kHasCudaGraphs) {
      GTEST_SKIP() << "no headers of CUDA";
    }
  }
};

} // namespace memcnn_test

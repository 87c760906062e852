// SPDX-License-Identifier: MIT
#pragma once

#include "data_parallel/world.h"

#include "support/ranks.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>

namespace memcnn_test {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

/// Expects a body to succeed in each of `size` processes, which form a group.
/// (Not threads: what c10d records of collectives is one for a whole process.)
inline void expect_in_group(
    int size,
    const std::function<void(const Group& group)>& body,
    parallel::Backend backend = parallel::Backend::kGloo) {
  expect_in_ranks(size, [&] {
    const auto world = parallel::World::join(
        parallel::WorldOptions().timeout(60s).backend(backend));
    body(world.group);
  });
}

/// Asked of another process: one that has used CUDA cannot start ranks that do.
inline bool has_gpu() {
  return run_ranks(0, 1, 1, [] { EXPECT_TRUE(torch::cuda::is_available()); })[0]
      .succeeded();
}

} // namespace memcnn_test

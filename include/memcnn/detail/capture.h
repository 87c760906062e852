// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <torch/version.h>

#include <cstdint>
#include <string>
#include <utility>

// Only a CUDA build of LibTorch has the first of these headers; the second comes
// with the CUDA Toolkit. MEMCNN_NO_CUDA is for a program that links none of CUDA
// though both are there.
#if !defined(MEMCNN_NO_CUDA) && __has_include(<c10/cuda/impl/cuda_cmake_macros.h>) && \
    __has_include(<cuda_runtime_api.h>)
#define MEMCNN_SEES_CUDA_CAPTURES 1
#include <ATen/Functions.h>
// Of these torch/torch.h brings none, and a program may have macros by now.
#pragma push_macro("min")
#pragma push_macro("max")
#undef min
#undef max
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#pragma pop_macro("max")
#pragma pop_macro("min")
#else
#define MEMCNN_SEES_CUDA_CAPTURES 0
#endif

namespace memcnn::detail {

// Note [Graph capture]
// ~~~~~~~~~~~~~~~~~~~~
// at::cuda::CUDAGraph records the kernels of a stream while a step runs once, and
// replays them without the host. A step of networks of this library can be
// captured as one of plain layers can: sequence, wrapper, checkpoint() with early
// stop, checkpoint_sequential(), couplings of both laws, autocast, dropout, a
// memory budget, the exact mode, a retained graph and several backward passes.
//
// 1. A replayed step computes what the eager step computes: the same kernels in
//    the same order. As for plain layers, the capture is of a stream other than
//    the default one, on which whole steps ran before, backward included (that
//    is where cuDNN chooses kernels for second runs, a budget is measured and the
//    exact mode gets its flag); inputs stay in their memory, and gradients are
//    none before the capture.
// 2. Random numbers are replayed: the second run of a branch draws those of its
//    first, others in each replay. LibTorch's generators can be read and set in a
//    capture from 2.10 on. Before, any run there is an error, unless
//    preserve_rng_state(false) says that nothing has to be replayed: whether a
//    branch draws, kernels such as that of dropout say by the generator's state
//    alone.
// 3. Forward and backward of a node are in one capture, or both eager: what a
//    node keeps for backward lies in memory of the one, which the other neither
//    fills anew nor may free. Anything else is an error.
// 4. In a capture a wrapper frees an input only if its memory was taken in that
//    capture: whatever was made before is read by every replay.
// 5. Nothing waits for the device. What compares values on the host is an error
//    in a capture: debug(true), check_invertible_module(). The exact mode checks
//    on the device (Note [Exact mode], rule 3). A layer that reads a value itself,
//    as batch normalisation with momentum(std::nullopt) does, fails as it would in
//    the plain network.
// 6. What the host decides is decided once, when the step is captured: options,
//    train and eval mode, which blocks a budget keeps, and every check of this
//    library; version counters do not move in a replay. An AllocationMeter sees
//    nothing of one. The same holds for numbers that the host hands to kernels,
//    such as the learning rate of torch::optim::SGD.

/// Which capture the work of a thread goes into. 0: none, it runs eagerly.
using CaptureId = uint64_t;

#if MEMCNN_SEES_CUDA_CAPTURES

inline CaptureId capture_of_cuda(at::Device device) {
  if (!device.is_cuda()) {
    return 0;
  }
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(
      c10::cuda::getCurrentCUDAStream(device.index()), &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

/// The pool from which this memory was taken; {0, 0} is that of eager work.
inline std::pair<uint64_t, uint64_t> pool_of(const void* memory) {
  const auto address = reinterpret_cast<size_t>(memory);
  for (const auto& segment :
       c10::cuda::CUDACachingAllocator::snapshot().segments) {
    const auto begin = static_cast<size_t>(segment.address);
    if (address >= begin && address - begin < segment.total_size) {
      return segment.owner_private_pool_id;
    }
  }
  return {0, 0};
}

/// A capture takes memory from a pool: that of a tensor made here. Captures that
/// share a pool cannot be told apart. It looks at all that the allocator holds,
/// which is done at capture alone.
inline bool is_of_this_cuda_capture(const at::Tensor& tensor) {
  const at::Tensor here = at::empty({1}, tensor.options());
  try {
    return pool_of(tensor.const_data_ptr()) == pool_of(here.const_data_ptr());
  } catch (const c10::Error&) { // an allocator that does not say
    return false;
  }
}

#else

inline CaptureId capture_of_cuda(at::Device /*device*/) {
  return 0;
}

inline bool is_of_this_cuda_capture(const at::Tensor& /*tensor*/) {
  return true;
}

#endif

/// What is known about captures; tests without a GPU put their own answers here.
struct CaptureFacts {
  CaptureId (*capture_of)(at::Device) = &capture_of_cuda;
  bool (*is_of_this_capture)(const at::Tensor&) = &is_of_this_cuda_capture;
  /// Whether a captured generator can be read and set (rule 2).
  bool generators_are_open = TORCH_VERSION_MAJOR > 2 ||
      (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 10);
};

inline CaptureFacts& capture_facts() {
  static CaptureFacts facts;
  return facts;
}

/// The capture that this thread's current stream of the device takes part in.
inline CaptureId capture_of(at::Device device) {
  return capture_facts().capture_of(device);
}

/// Whether the memory of a tensor was taken in the capture that is under way.
inline bool is_of_this_capture(const at::Tensor& tensor) {
  return capture_facts().is_of_this_capture(tensor);
}

/// Where some work goes, for error messages.
inline std::string describe_capture(CaptureId capture) {
  return capture == 0 ? "eager work" : c10::str("capture ", capture);
}

/// Stops in a capture what needs the device's answer there and then. Of
/// `expected`, "memcnn: expected debug(true)", the message says that it is
/// eager, since it does `why`; `cure` is what to change.
inline void check_eager(
    at::Device device,
    const char* expected,
    const char* why,
    const char* cure) {
  const CaptureId capture = capture_of(device);
  TORCH_CHECK(
      capture == 0,
      expected,
      " to run eagerly, since it ",
      why,
      ", but got ",
      describe_capture(capture),
      " of ",
      device,
      ". ",
      cure);
}

} // namespace memcnn::detail

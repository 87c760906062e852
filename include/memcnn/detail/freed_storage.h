// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/ownership.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace memcnn::detail {

// Note [Freed inputs]
// ~~~~~~~~~~~~~~~~~~~
// For InvertibleModuleWrapper only: a sequence frees nothing that a caller
// holds.
//
// 1. A storage is emptied and refilled in place, with no version bump, so that
//    an upstream node that saved the same tensor finds it whole again. Zeros of
//    a ReLU come back as zeros: its backward asks where its output is positive,
//    and a zero rebuilt from a sum is a rounding error of either sign. Where
//    they were is kept, one byte a value.
// 2. It is freed only when a graph is being recorded and nobody else can be
//    hurt as far as can be seen: not a leaf, no view, not empty, offset 0,
//    dense, filling its storage, shared by no output, of an allocator that
//    LibTorch knows.
//    Owners that may share it are the tensor itself and the saved output of the
//    node that made it: one of our own, whose record is consulted, or one of
//    the few operators known to save their output. Any other live tensor on it:
//    kept. input_kept_because() tells why.
// 3. Who touches a freed tensor before backward gets an error that names
//    memcnn, the block and the option to set: the tensor points to a poisoned
//    storage while the emptied one waits. The node that made it is guarded,
//    too, where it saved its output: a backward pass that reaches it past the
//    block stops before it reads.
// 4. A failed forward leaves every tensor whole: all that can fail is done
//    before the first byte is freed. After a failed backward a tensor is whole
//    or gives rule 3's error; the library stays usable.
// 5. The peak of a step does not grow with the number of wrapped blocks beyond
//    parameters and gradients.

/// Whether this autograd node saves what it returns, and so refers to the
/// memory of its output by a tensor of its own.
inline bool saves_its_output(const torch::autograd::Node& node) {
  static constexpr std::array<std::string_view, 6> kNames = {
      "ReluBackward0",
      "SigmoidBackward0",
      "TanhBackward0",
      "ExpBackward0",
      "SoftmaxBackward0",
      "LogSoftmaxBackward0"};
  const std::string name = node.name();
  return std::find(kNames.begin(), kNames.end(), name) != kNames.end();
}

/// The zeros that a ReLU made. Its backward asks where its output is positive:
/// rebuilt from a sum, a zero would come back as a rounding error of either
/// sign, and let gradient pass that the plain network stops.
///
/// Memory:   one byte a value.
class ReluZeros {
 public:
  explicit ReluZeros(const at::Tensor& tensor) {
    if (tensor.grad_fn()->name() == "ReluBackward0") {
      zeros_ = tensor.detach().eq(0);
    }
  }

  /// Makes rebuilt values zero where they were, and positive elsewhere.
  void put_back(const at::Tensor& rebuilt) const {
    if (zeros_.defined()) {
      // Normal numbers, in float16 and in the others.
      const double positive =
          rebuilt.scalar_type() == at::kHalf ? 6.2e-5 : 1.2e-38;
      rebuilt.clamp_min_(positive).masked_fill_(zeros_, 0);
    }
  }

 private:
  at::Tensor zeros_;
};

inline bool is_emptied(const c10::StorageImpl& storage) {
  return storage.nbytes() == 0;
}

/// Runs before the node that made a freed tensor. If that node saved its own
/// output, it is about to read the tensor's memory: by then it must be back.
class FreedOutputCheck final : public torch::autograd::FunctionPreHook {
 public:
  FreedOutputCheck(const c10::Storage& storage, std::string message)
      : storage_(c10::weak_intrusive_ptr<c10::StorageImpl>(
            c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(
                storage.unsafeGetStorageImpl()))),
        message_(std::move(message)) {}

  torch::autograd::variable_list operator()(
      const torch::autograd::variable_list& grads) override {
    const auto storage = storage_.lock();
    TORCH_CHECK(!storage || !is_emptied(*storage), message_);
    return grads;
  }

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  std::string message_;
};

/// A tensor whose memory was given back in forward, and what it takes to make
/// it whole again in backward (Note [Freed inputs]).
///
/// The storage object stays, emptied, since the node that made the tensor may
/// refer to it; it is refilled in place, which moves no version counter. The
/// tensor itself points to a poisoned storage meanwhile: reading it raises an
/// error that says what to do.
class FreedStorage {
 public:
  /// Why the memory of `tensor` may not be freed; null if it may
  /// (Note [Freed inputs], rule 2).
  ///
  /// `producer_owners` is how many tensors the producing node itself keeps on
  /// that memory.
  static const char* reason_to_keep(
      const at::Tensor& tensor,
      size_t producer_owners) {
    if (tensor.is_leaf()) {
      return "it is a leaf, so it belongs to the caller";
    }
    if (tensor.is_view()) {
      return "it is a view of another tensor";
    }
    if (tensor.numel() == 0) {
      return "it is empty"; // and would look as if it were freed already
    }
    if (!tensor.has_storage() || tensor.storage_offset() != 0 ||
        !tensor.is_non_overlapping_and_dense() ||
        tensor.storage().nbytes() != tensor.nbytes()) {
      return "it does not fill its storage";
    }
    const c10::StorageImpl& storage = *tensor.storage().unsafeGetStorageImpl();
    if (!storage.resizable() || storage.allocator() == nullptr) {
      return "its storage belongs to another library, or is freed already";
    }
    if (tensor.storage().use_count() > 1 + producer_owners) {
      return "another tensor shares its storage";
    }
    return nullptr;
  }

  /// Prepares to free; ask reason_to_keep() first. `message` is what a reader
  /// will get.
  FreedStorage(const at::Tensor& tensor, const std::string& message)
      : tensor_(tensor.getIntrusivePtr()),
        storage_(tensor.storage()),
        nbytes_(storage_.nbytes()),
        sizes_(tensor.sizes().vec()),
        strides_(tensor.strides().vec()),
        options_(tensor.options()),
        zeros_(tensor) {
    // A storage whose data may not be touched: every read throws `message`. Its
    // size is the true one, so that reads get as far as asking for the data.
    auto poison = c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(),
        nbytes_,
        at::DataPtr(nullptr, storage_.device()),
        /*allocator=*/nullptr,
        /*resizable=*/false);
    poison->release_data_and_set_meta_custom_data_ptr_error_msg_(message);
    poison_ = c10::Storage(std::move(poison));

    if (storage_.use_count() > 2) { // the tensor and this object; a third one
      tensor.grad_fn()->add_pre_hook(
          std::make_unique<FreedOutputCheck>(storage_, message));
    }
  }

  /// Frees. All that can fail was done before.
  void free(const at::Tensor& tensor) {
    c10::StorageImpl& storage = *storage_.unsafeGetStorageImpl();
    storage.set_data_ptr_noswap(at::DataPtr(nullptr, storage.device()));
    storage.set_nbytes(0);
    tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(poison_);
  }

  /// Puts the memory of `rebuilt` where the freed memory was. The caller gives
  /// `rebuilt` up; where it is not the only owner, or is laid out otherwise, it
  /// is copied.
  void restore(at::Tensor rebuilt) {
    const at::NoGradGuard no_grad;
    if (!is_emptied(*storage_.unsafeGetStorageImpl())) {
      return; // whole already: an earlier pass over a retained graph
    }
    const auto tensor = tensor_.lock();
    if (!tensor && storage_.use_count() == 1) {
      return; // nobody is left to read it
    }
    if (!is_sole_owner(rebuilt) || rebuilt.storage_offset() != 0 ||
        rebuilt.strides() != strides_ ||
        rebuilt.storage().nbytes() != nbytes_) {
      rebuilt = at::empty_strided(sizes_, strides_, options_).copy_(rebuilt);
    }
    zeros_.put_back(rebuilt);
    c10::StorageImpl& source = *rebuilt.storage().unsafeGetStorageImpl();
    c10::StorageImpl& target = *storage_.unsafeGetStorageImpl();
    at::DataPtr data =
        source.set_data_ptr(at::DataPtr(nullptr, source.device()));
    source.set_nbytes(0);
    target.set_data_ptr_noswap(std::move(data));
    target.set_nbytes(nbytes_);
    // The caller may have given the tensor other memory since.
    if (tensor &&
        tensor->storage().unsafeGetStorageImpl() ==
            poison_.unsafeGetStorageImpl()) {
      tensor->set_storage_keep_dtype(storage_);
    }
  }

 private:
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor_;
  c10::Storage storage_;
  c10::Storage poison_;
  size_t nbytes_;
  std::vector<int64_t> sizes_;
  std::vector<int64_t> strides_;
  at::TensorOptions options_;
  ReluZeros zeros_;
};

} // namespace memcnn::detail

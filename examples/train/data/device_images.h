// SPDX-License-Identifier: MIT
#pragma once

#include "train/data/batches.h"
#include "train/data/images.h"
#include "train/data/normalisation.h"

#include <torch/types.h>

#include <algorithm>
#include <cstdint>

namespace training {

/// Labelled images as bytes on a device, and batches of them that the device
/// makes by operators alone: nothing of it waits, and a graph can capture it.
///
/// A batch has the bits of one that Normalisation and copy_window() make: its
/// values are looked up in the same table.
class DeviceImages final {
 public:
  /// Batches are laid out in `format`.
  DeviceImages(
      const Images& images,
      const Normalisation& normalise,
      torch::Device device,
      at::MemoryFormat format)
      : format_(format),
        pixels_(images.pixels.to(device).contiguous()),
        labels_(images.labels.to(device)),
        values_(normalise.table(device)),
        channel_(torch::arange(3, on(device)).view({3, 1, 1})),
        place_(torch::arange(kImageSize, on(device))) {}

  int64_t size() const {
    return labels_.size(0);
  }

  /// On the device.
  torch::Tensor labels() const {
    return labels_;
  }

  /// The images from `first` on, at most `count`, as they are: for evaluation.
  Batch whole(int64_t first, int64_t count) const {
    count = std::min(count, size() - first);
    return {
        looked_up(codes_of(pixels_.narrow(0, first, count))),
        labels_.narrow(0, first, count)};
  }

  /// One image a crop. `crops` is (4, N), int64: of each the image, the window's
  /// top and left, and 1 where it is mirrored.
  Batch cropped(const torch::Tensor& crops) const {
    const auto of_each = [&](int64_t what) {
      return crops.select(0, what).unsqueeze(1); // (N, 1)
    };
    const auto flip = of_each(3);
    const auto row = (of_each(1) + place_).view({-1, 1, kImageSize, 1});
    // From the right where it is mirrored: 31 - x.
    const auto column =
        (of_each(2) + flip * (kImageSize - 1) + (1 - 2 * flip) * place_)
            .view({-1, 1, 1, kImageSize});
    const auto image = crops.select(0, 0);
    const auto offset =
        ((image.view({-1, 1, 1, 1}) * 3 + channel_) * kImageSize +
         within(row)) *
            kImageSize +
        within(column); // (N, 3, 32, 32)
    const auto codes = codes_of(
        pixels_.view(-1).index_select(0, offset.view(-1)).view(offset.sizes()));
    return {
        looked_up(codes.masked_fill(
            is_outside(row).logical_or(is_outside(column)),
            Normalisation::kPadding)),
        labels_.index_select(0, image)};
  }

 private:
  static torch::TensorOptions on(torch::Device device) {
    return torch::TensorOptions(device).dtype(torch::kInt64);
  }

  static torch::Tensor within(const torch::Tensor& position) {
    return position.clamp(0, kImageSize - 1);
  }

  static torch::Tensor is_outside(const torch::Tensor& position) {
    return position.lt(0).logical_or(position.ge(kImageSize));
  }

  /// Where the values of (N, 3, 32, 32) bytes stand in the table.
  torch::Tensor codes_of(const torch::Tensor& bytes) const {
    return bytes.to(torch::kInt64).add(channel_ * Normalisation::kLevels);
  }

  torch::Tensor looked_up(const torch::Tensor& codes) const {
    return values_.index_select(0, codes.view(-1))
        .view(codes.sizes())
        .contiguous(format_);
  }

  at::MemoryFormat format_;
  torch::Tensor pixels_; // (N, 3, 32, 32), uint8
  torch::Tensor labels_; // (N), int64
  torch::Tensor values_; // of Normalisation
  torch::Tensor channel_; // 0, 1, 2
  torch::Tensor place_; // 0 to 31
};

} // namespace training

// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"

#include <fmt/format.h>
#include <png.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <string>

namespace glow {

/// Images side by side, in rows of so many, with a light gap between them.
///
/// Shapes:   images (N, 3, H, W), uint8; the result (3, H', W').
inline torch::Tensor contact_sheet(
    const torch::Tensor& images,
    int64_t columns) {
  constexpr int64_t kGap = 2; // pixels
  constexpr int64_t kLight = 240;
  const int64_t rows = (images.size(0) + columns - 1) / columns;
  const int64_t height = images.size(2), width = images.size(3);
  const torch::Tensor sheet = torch::full(
      {3, rows * (height + kGap) + kGap, columns * (width + kGap) + kGap},
      kLight,
      torch::kUInt8);
  for (int64_t i = 0; i < images.size(0); ++i) {
    sheet.narrow(1, kGap + i / columns * (height + kGap), height)
        .narrow(2, kGap + i % columns * (width + kGap), width)
        .copy_(images[i]);
  }
  return sheet;
}

/// The bytes of a PNG file with an image, (3, H, W), uint8, on the CPU.
///
/// Throws:   Error if libpng fails.
inline std::string png_of(const torch::Tensor& image) {
  const torch::Tensor rows = image.permute({1, 2, 0}).contiguous();
  png_image header = {};
  header.version = PNG_IMAGE_VERSION;
  header.width = static_cast<png_uint_32>(image.size(2));
  header.height = static_cast<png_uint_32>(image.size(1));
  header.format = PNG_FORMAT_RGB;
  const auto write = [&](void* memory, png_alloc_size_t& size) {
    const int done = png_image_write_to_memory(
        &header,
        memory,
        &size,
        /*convert_to_8_bit=*/0,
        rows.const_data_ptr(),
        /*row_stride=*/0,
        /*colormap=*/nullptr);
    if (done == 0) {
      throw support::Error(fmt::format(
          "expected libpng to write an image of {} x {} pixels, but got: {}. "
          "Install another version of libpng.",
          header.width,
          header.height,
          static_cast<const char*>(header.message)));
    }
  };
  png_alloc_size_t size = 0;
  write(nullptr, size); // says how much it takes
  std::string bytes(size, '\0');
  write(bytes.data(), size);
  bytes.resize(size);
  return bytes;
}

} // namespace glow

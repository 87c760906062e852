// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/channels.h>
#include <memcnn/detail/layout.h>
#include <memcnn/detail/log_det_sum.h>
#include <memcnn/detail/ownership.h>
#include <memcnn/detail/tensors.h>

#include <ATen/Functions.h>
#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <cstdint>
#include <utility>

namespace memcnn::detail {

/// How the pixels of a stream make matrices whose one dimension is the channels.
enum class PixelsAs {
  kColumns, ///< (N, C, P): what lies in memory where channels come first
  kRows ///< (1, N P, C): where channels come last, or there are no pixels
};

inline PixelsAs pixels_in(const at::Tensor& part) {
  return part.dim() == 2 ||
          part.suggest_memory_format() != at::MemoryFormat::Contiguous
      ? PixelsAs::kRows
      : PixelsAs::kColumns;
}

/// A part of a stream as these matrices: a view, unless it is laid out as the
/// other ones.
inline at::Tensor matrices_of(const at::Tensor& part, PixelsAs pixels) {
  const int64_t samples = part.size(0);
  const int64_t channels = part.size(1);
  return pixels == PixelsAs::kColumns
      ? part.reshape({samples, channels, pixels_of(part)})
      : part.movedim(1, -1).reshape({1, samples * pixels_of(part), channels});
}

/// What these matrices are in the sizes and layout of a part.
inline at::Tensor
stream_of(at::Tensor matrices, PixelsAs pixels, const at::Tensor& like) {
  if (pixels == PixelsAs::kColumns) {
    matrices = matrices.view(like.sizes());
  } else {
    at::DimVector sizes(like.sizes());
    sizes.push_back(sizes[1]);
    sizes.erase(sizes.begin() + 1);
    matrices = matrices.view(sizes).movedim(-1, 1);
  }
  return no_view(laid_out_as(like, std::move(matrices)));
}

/// The product of a matrix, (C, C), and the channels of each pixel of a stream,
/// which comes, and goes, as one tensor or as two halves of the channels: of these
/// the matrix has four blocks, whose products are added up where they are.
inline Tensors channel_product(const at::Tensor& matrix, const Tensors& parts) {
  Tensors products;
  int64_t row = 0;
  for (const at::Tensor& like : parts) {
    const PixelsAs pixels = pixels_in(like);
    at::Tensor sum;
    int64_t column = 0;
    for (const at::Tensor& part : parts) {
      const at::Tensor block = matrix.narrow(0, row, like.size(1))
                                   .narrow(1, column, part.size(1))
                                   .unsqueeze(0);
      column += part.size(1);
      at::Tensor left = matrices_of(part, pixels);
      at::Tensor right = block.mT();
      if (pixels == PixelsAs::kColumns) {
        right = std::exchange(left, block.expand({part.size(0), -1, -1}));
      }
      if (!sum.defined()) {
        sum = at::bmm(left, right);
      } else if (at::GradMode::is_enabled()) {
        sum = at::baddbmm(sum, left, right);
      } else {
        sum.baddbmm_(left, right);
      }
    }
    row += like.size(1);
    products.push_back(stream_of(std::move(sum), pixels, like));
  }
  return products;
}

/// The sum over pixels of the products of each channel of one stream and each of
/// another, (C, C): the gradient of the matrix of channel_product(), for the
/// gradient of what it returned, and what it was given. In the dtype of
/// log-determinants.
inline at::Tensor channel_outer(const Tensors& rows, const Tensors& columns) {
  Tensors blocks;
  for (const at::Tensor& row : rows) {
    Tensors of_row;
    for (const at::Tensor& column : columns) {
      // One matrix a sample is more than the stream where channels outnumber
      // pixels: then the pixels of all samples are copied together.
      const PixelsAs pixels =
          row.size(1) > pixels_of(row) ? PixelsAs::kRows : pixels_in(row);
      const at::Tensor left = matrices_of(row, pixels);
      const at::Tensor right = matrices_of(column, pixels);
      const at::Tensor products = pixels == PixelsAs::kRows
          ? at::bmm(left.mT(), right)
          : at::bmm(left, right.mT());
      of_row.push_back(
          products.sum(0, /*keepdim=*/false, LogDetSum::dtype_for(row)));
    }
    blocks.push_back(at::cat(of_row, 1));
  }
  return at::cat(blocks, 0);
}

} // namespace memcnn::detail

// SPDX-License-Identifier: MIT
#pragma once

// Labelled images of ten classes: CIFAR-10 from its files, or drawn ones.

#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

struct Images {
  torch::Tensor pixels; // (N, 3, 32, 32), uint8
  torch::Tensor labels; // (N), int64

  /// What a network takes: (N, 3, 32, 32), from -2 to 2.
  torch::Tensor input() const {
    return pixels.to(torch::kFloat32).sub(128).div(64);
  }
  /// Batches of `size` images, in their order; the last may be smaller.
  std::vector<Images> split(int64_t size) const {
    const auto parts = pixels.split(size);
    const auto parts_of_labels = labels.split(size);
    std::vector<Images> batches;
    for (size_t i = 0; i < parts.size(); ++i) {
      batches.push_back({parts[i], parts_of_labels[i]});
    }
    return batches;
  }
};

struct DataSet {
  Images train;
  Images test;
};

/// Reads files of CIFAR-10's binary version: records of a label byte and 3 x 32
/// x 32 pixel bytes.
inline Images read_cifar10(const std::vector<std::string>& paths) {
  constexpr int64_t kRecordBytes = 1 + 3 * 32 * 32;
  std::vector<torch::Tensor> records;
  for (const std::string& path : paths) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
    const auto count = static_cast<int64_t>(bytes.size()) / kRecordBytes;
    TORCH_CHECK_VALUE(
        file.is_open(),
        "expected a file ",
        path,
        ", but there is none. Give the folder of CIFAR-10's binary version.");
    TORCH_CHECK_VALUE(
        count > 0 && bytes.size() % kRecordBytes == 0,
        "expected ",
        path,
        " to hold records of 3073 bytes, but read ",
        bytes.size(),
        " bytes. Give the folder of CIFAR-10's binary version.");
    records.push_back(
        torch::from_blob(bytes.data(), {count, kRecordBytes}, torch::kUInt8)
            .clone());
    const auto largest = records.back().select(1, 0).max().item<int64_t>();
    TORCH_CHECK_VALUE(
        largest < 10,
        "expected labels below 10 in ",
        path,
        ", but got ",
        largest,
        ". Give the folder of CIFAR-10's binary version.");
  }
  const auto all = torch::cat(records); // (N, 3073)
  return {
      all.slice(1, 1).reshape({-1, 3, 32, 32}),
      all.select(1, 0).to(torch::kInt64)};
}

/// Draws grids of one to five columns and one or two rows, which is the class,
/// at any place and of any colour, with noise on every pixel.
inline Images draw_images(int64_t count) {
  const auto random = [](at::IntArrayRef sizes, double low, double high) {
    return torch::rand(sizes) * (high - low) + low;
  };
  const auto labels = torch::arange(count).remainder(10); // (N)
  const auto columns = labels.remainder(5).add(1).view({-1, 1, 1, 1});
  const auto rows = labels.floor_divide(5).add(1).view({-1, 1, 1, 1});
  const auto turn = torch::arange(32) * (2 * M_PI / 32); // from edge to edge
  const auto place = [&] {
    return random({count, 1, 1, 1}, 0, 2 * M_PI);
  };
  const auto across = torch::sin(columns * turn.view({1, 32}) + place());
  const auto down = torch::sin(rows * turn.view({32, 1}) + place());
  const auto colour = random({count, 3, 1, 1}, -80, 80);
  const auto noise = random({count, 3, 32, 32}, -40, 40);
  const auto pixels = 128 + across * down * colour + noise;
  return {pixels.to(torch::kUInt8), labels};
}

/// Reads CIFAR-10 from a folder or, where none is named, draws images.
inline DataSet load_images(const std::string& folder, torch::Device device) {
  DataSet data;
  if (folder.empty()) {
    data = {draw_images(4000), draw_images(1000)};
  } else {
    const std::string batch = folder + "/data_batch_";
    data = {
        read_cifar10(
            {batch + "1.bin",
             batch + "2.bin",
             batch + "3.bin",
             batch + "4.bin",
             batch + "5.bin"}),
        read_cifar10({folder + "/test_batch.bin"})};
  }
  for (Images* images : {&data.train, &data.test}) {
    images->pixels = images->pixels.to(device);
    images->labels = images->labels.to(device);
  }
  return data;
}

/// Draws images at random, shifts each by up to four pixels and mirrors every
/// other one, so that a network never sees quite the same image again. All of it
/// on the images' device: a captured step draws anew in each replay.
inline Images random_batch(const Images& images, int64_t size) {
  const auto integers = images.labels.options();
  const auto chosen =
      torch::randint(images.labels.size(0), {size}, integers); // (size)
  const auto padded = torch::constant_pad_nd( // (size, 3, 40, 40)
      images.pixels.index_select(0, chosen),
      {4, 4, 4, 4},
      /*value=*/128);
  const auto shifts = torch::randint(9, {size, 2}, integers).t();

  const auto along = torch::arange(32, integers);
  const auto mirror = torch::arange(size, integers).remainder(2).view({-1, 1});
  const auto rows = shifts[0].view({-1, 1}) + along; // (size, 32)
  const auto columns = // (size, 32)
      shifts[1].view({-1, 1}) + torch::where(mirror == 0, along, 31 - along);
  const auto places = rows.unsqueeze(2) * 40 + columns.unsqueeze(1);
  const auto windows = padded.flatten(2).gather(
      2, places.view({-1, 1, 32 * 32}).expand({-1, 3, -1}));
  return {windows.view({-1, 3, 32, 32}), images.labels.index_select(0, chosen)};
}

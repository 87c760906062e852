// SPDX-License-Identifier: MIT

#include "support/error.h"
#include "train/base/checksum.h"
#include "train/data/batches.h"
#include "train/data/cifar.h"
#include "train/data/device_images.h"
#include "train/data/images.h"
#include "train/data/normalisation.h"
#include "train/data/prepared_batches.h"
#include "train/data/synthetic.h"
#include "train/data/window.h"

#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <unistd.h>

namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;
using namespace training;

class CifarReader : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = std::filesystem::temp_directory_path() /
        ("memcnn_cifar_" + std::to_string(::getpid()));
    std::filesystem::create_directories(directory_);
    write("train.bin", {3, 9}, 0);
    write("test.bin", {1}, 100);
  }

  // Not with remove_all(): the LibTorch of the Python package brings a copy of
  // std::filesystem along in which that function calls a null pointer.
  void TearDown() override {
    for (const auto& folder : {directory_ / "tiny-folder", directory_}) {
      for (const char* name : {"train.bin", "test.bin", "names.txt"}) {
        std::filesystem::remove(folder / name);
      }
      std::filesystem::remove(folder);
    }
  }

  /// Records of a coarse label 77, the label, and pixels that count from
  /// `first`.
  void
  write(const std::string& name, const std::vector<int>& labels, int first) {
    std::ofstream file(directory_ / name, std::ios::binary);
    for (const int label : labels) {
      file.put(77).put(static_cast<char>(label));
      for (int64_t i = 0; i < kImageBytes; ++i) {
        file.put(static_cast<char>(first + i));
      }
      ++first;
    }
  }

  DataSet read() {
    return read_cifar(files_, directory_.string());
  }

  std::filesystem::path directory_;
  CifarFiles
      files_{"tiny", "tiny-folder", {"train.bin"}, {"test.bin"}, 2, 1, 2, 10};
};

TEST_F(CifarReader, ReadsLabelsAndPixels) {
  const auto data = read();
  EXPECT_EQ(data.num_classes, 10);
  EXPECT_TRUE(torch::equal(data.train.labels, torch::tensor({3, 9})));
  EXPECT_TRUE(torch::equal(data.test.labels, torch::tensor({1})));
  EXPECT_EQ(data.train.pixels.sizes(), torch::IntArrayRef({2, 3, 32, 32}));
  EXPECT_EQ(data.train.pixels[1][0][0][0].item<int>(), 1);
  EXPECT_EQ(data.test.pixels[0][2][1][5].item<int>(), (100 + 2048 + 37) % 256);
}

TEST_F(CifarReader, KnowsTheNamesOfClassesWhereTheirFileIsThere) {
  EXPECT_TRUE(read().class_names.empty());
  files_.class_names = "names.txt";
  EXPECT_TRUE(read().class_names.empty());
  const auto names_of = [&](const std::string& text) {
    std::ofstream(directory_ / "names.txt") << text;
    return read().class_names;
  };
  EXPECT_THAT(
      names_of("a\nb\nc\nd\ne\nf\ng\r\nh\n\x1b\nj\n\n"),
      ElementsAre("a", "b", "c", "d", "e", "f", "g", "h", "\\x1b", "j"));
  EXPECT_EQ(read().class_names_flaw, "");
  EXPECT_TRUE(names_of("a\nb\n").empty()) << "of another data set";
  EXPECT_TRUE(names_of("a\nb\nc\nd\ne\nf\ng\nh\ni\na\n").empty());
  EXPECT_EQ(
      read().class_names_flaw,
      "expected " + (directory_ / "names.txt").string() +
          " to have 10 different names, but it has 10, 9 of them different: "
          "classes go by their numbers");
}

TEST_F(CifarReader, FindsTheFolderOfTheArchive) {
  std::filesystem::create_directories(directory_ / "tiny-folder");
  for (const char* name : {"train.bin", "test.bin"}) {
    std::filesystem::rename(
        directory_ / name, directory_ / "tiny-folder" / name);
  }
  EXPECT_NO_THROW(read());
}

TEST_F(CifarReader, NamesMissingTruncatedAndCorruptFiles) {
  write("test.bin", {10}, 0);
  EXPECT_THAT(
      [this] { read(); },
      ThrowsMessage<support::Error>(
          HasSubstr("test.bin to be below 10, but record 0 has 10")));
  std::filesystem::resize_file(directory_ / "test.bin", 3073);
  EXPECT_THAT(
      [this] { read(); },
      ThrowsMessage<support::Error>(
          HasSubstr("test.bin to have 3074 bytes, but it has 3073")));
  std::filesystem::remove(directory_ / "test.bin");
  EXPECT_THAT(
      [this] { read(); },
      ThrowsMessage<support::Error>(
          HasSubstr("test.bin to be a file of 3074 bytes, but there is none")));
}

TEST(Synthetic, IsDeterministicAndBalanced) {
  SyntheticSizes sizes;
  sizes.train = 50;
  sizes.test = 20;
  const auto first = make_synthetic(sizes);
  const auto second = make_synthetic(sizes);
  EXPECT_TRUE(torch::equal(first.train.pixels, second.train.pixels));
  EXPECT_TRUE(torch::equal(first.test.pixels, second.test.pixels));
  EXPECT_FALSE(
      torch::equal(first.train.pixels.narrow(0, 0, 20), first.test.pixels));
  EXPECT_TRUE(torch::equal(
      torch::bincount(first.train.labels),
      torch::full({10}, 5, torch::kInt64)));
  EXPECT_EQ(first.train.pixels.scalar_type(), torch::kUInt8);
  EXPECT_EQ(first.train.pixels.sizes(), torch::IntArrayRef({50, 3, 32, 32}));
}

TEST(Normalisation, UsesMeanAndVarianceOfTheTrainingImages) {
  Images images{
      torch::randint(20, 90, {40, 3, 32, 32}, torch::kUInt8),
      torch::arange(40)};
  const Normalisation normalise(images.pixels);
  const DeviceImages on_cpu(
      images, normalise, torch::kCPU, at::MemoryFormat::Contiguous);
  const Batch batch = on_cpu.whole(0, 40);
  EXPECT_TRUE(torch::equal(batch.labels, images.labels));
  EXPECT_TRUE(torch::allclose(
      batch.images.mean({0, 2, 3}), torch::zeros({3}), 0, 1e-4));
  EXPECT_TRUE(torch::allclose(
      batch.images.std({0, 2, 3}, /*unbiased=*/false), torch::ones({3}), 1e-4));
  const Batch last = on_cpu.whole(30, 20);
  EXPECT_TRUE(torch::equal(last.images, batch.images.narrow(0, 30, 10)));
}

TEST(DrawWindows, ShiftByUpToFourAndFlip) {
  const auto windows =
      draw_windows(200, at::detail::createCPUGenerator(/*seed=*/3));
  std::set<std::pair<int64_t, int64_t>> shifts;
  int64_t flipped = 0;
  for (const Window& window : windows) {
    EXPECT_LE(std::abs(window.top), 4);
    EXPECT_LE(std::abs(window.left), 4);
    shifts.emplace(window.top, window.left);
    flipped += window.flip ? 1 : 0;
  }
  EXPECT_GT(shifts.size(), 50U); // of 81
  EXPECT_GT(flipped, 70);
  EXPECT_LT(flipped, 130);
}

TEST(CopyWindow, CutsOutWhatLibTorchCutsOut) {
  const auto pixels = torch::randint(256, {1, 3, 32, 32}, torch::kUInt8);
  const Normalisation normalise(pixels);
  const auto copy = [&](const Window& window) {
    auto out = torch::empty({1, 3, 32, 32});
    copy_window(
        pixels.const_data_ptr<uint8_t>(),
        window,
        normalise,
        out.data_ptr<float>());
    return out;
  };
  const auto padded = torch::constant_pad_nd(copy({}), {4, 4, 4, 4});
  for (const bool flip : {false, true}) {
    for (const int64_t top : {-4, 0, 3}) {
      for (const int64_t left : {-3, 0, 4}) {
        auto expected = padded.narrow(2, 4 + top, 32).narrow(3, 4 + left, 32);
        expected = flip ? expected.flip(3) : expected;
        EXPECT_TRUE(torch::equal(copy({top, left, flip}), expected))
            << top << " " << left << " " << flip;
      }
    }
  }
}

TEST(TrainingBatches, ShowEveryImageOncePerPassAndRepeat) {
  Images images{
      torch::zeros({12, 3, 32, 32}, torch::kUInt8), torch::arange(12)};
  images.pixels.select(1, 0).fill_(9);
  const Normalisation normalise(
      torch::randint(9, {4, 3, 32, 32}, torch::kUInt8));
  TrainingBatches first(images, normalise, 4, /*seed=*/1);
  TrainingBatches second(images, normalise, 4, /*seed=*/1);
  for (const int64_t pass : {0, 1}) {
    std::vector<torch::Tensor> labels;
    for (int64_t index = 0; index < 3; ++index) {
      labels.push_back(first.at(3 * pass + index).labels);
    }
    EXPECT_TRUE(torch::equal(
        std::get<0>(torch::cat(labels).sort()), torch::arange(12)));
  }
  torch::rand({7}); // what others draw makes no difference
  const auto again = second.at(5); // nor what came before
  EXPECT_TRUE(torch::equal(again.labels, first.at(5).labels));
  EXPECT_TRUE(torch::equal(again.images, first.at(5).images));
}

TEST(PreparedBatches, AreTheTrainingBatchesInAnyOrder) {
  Images images{
      torch::randint(256, {12, 3, 32, 32}, torch::kUInt8), torch::arange(12)};
  TrainingBatches batches(images, Normalisation(images.pixels), 4, /*seed=*/1);
  PreparedBatches prepared(batches);
  for (const int64_t iteration : {0, 1, 2, 3, 3, 7, 8, 2}) {
    const Batch& found = prepared.at(iteration);
    const Batch expected = batches.at(iteration);
    EXPECT_TRUE(torch::equal(found.images, expected.images)) << iteration;
    EXPECT_TRUE(torch::equal(found.labels, expected.labels)) << iteration;
  }
}

TEST(Fingerprint, ChangesWithEveryByte) {
  SyntheticSizes sizes;
  sizes.train = 3;
  sizes.test = 2;
  auto data = make_synthetic(sizes);
  const auto before = fingerprint(data);
  EXPECT_EQ(fingerprint(make_synthetic(sizes)), before);
  data.test.pixels[1][2][31][31].add_(1);
  EXPECT_NE(fingerprint(data), before);
  data.test.pixels[1][2][31][31].sub_(1);
  EXPECT_EQ(fingerprint(data), before);
  data.train.labels[0].add_(1);
  EXPECT_NE(fingerprint(data), before);
}

TEST(Checksum, IsThatOfThePublishedTestVectors) {
  EXPECT_EQ(checksum_text(checksum("")), "00000000");
  EXPECT_EQ(checksum_text(checksum("123456789")), "cbf43926");
  EXPECT_EQ(checksum("56789", checksum("1234")), checksum("123456789"));
}

} // namespace

// SPDX-License-Identifier: MIT

// fuzz_seeds FOLDER: writes the inputs that the fuzzers start from, in a folder
// for each. Most are what the programs and Python write.

#include "train/run/checkpoint_content.h"
#include "train/run/seal.h"
#include "train/weights/state_dict.h"

#include <filesystem>
#include <fstream>
#include <string>

namespace {

namespace fs = std::filesystem;
using namespace training;

void write(const fs::path& path, const std::string& bytes) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
}

StateDict some_tensors() {
  StateDict state;
  state.insert("layer.weight", at::ones({2, 1, 3}));
  state.insert("layer.count", at::ones({}, at::kLong));
  state.insert("layer.empty", at::ones({0, 3}, at::kHalf));
  return state;
}

void write_files_of_weights(const fs::path& folder) {
  write(folder / "archive/ours", archive_of(some_tensors()));
  write(folder / "archive/empty", archive_of(StateDict()));
  for (const std::string name : {"tensors", "checkpoint", "whole_module"}) {
    const fs::path path = fs::path(MEMCNN_TEST_DATA_DIR) / "weights" / name;
    std::ifstream file(path.string() + ".pt", std::ios::binary);
    write(folder / "pickle" / name, ZipReader(file).text("data.pkl"));
  }
  std::ifstream file(
      fs::path(MEMCNN_TEST_DATA_DIR) / "weights/tensors.pt", std::ios::binary);
  write(
      folder / "archive/python",
      std::string(std::istreambuf_iterator<char>(file), {}));
}

void write_checkpoints(const fs::path& folder) {
  Checkpoint checkpoint;
  checkpoint.recipe = {{"model", "resnet32"}, {"learning_rate", 0.1}};
  checkpoint.state.add(StepSums());
  const nlohmann::json about = {
      {"recipe", checkpoint.recipe},
      {"images", 7},
      {"state", checkpoint.state}};
  write(folder / "checkpoint/description", about.dump());
  write(folder / "checkpoint/sealed", seal("content"));
  write(folder / "archive/checkpoint", checkpoint_bytes(checkpoint));
}

} // namespace

int main(int argc, const char** argv) {
  if (argc != 2) {
    return 1;
  }
  const fs::path folder = argv[1];
  write_files_of_weights(folder);
  write_checkpoints(folder);
  write(folder / "images/cifar10", std::string(1 + 3072, '\x09'));
  write(folder / "images/cifar100", std::string(2 + 3072, '\x63'));
  write(
      folder / "options/all",
      "# comment\nMODEL = \"revnet38\"\ncount = 7\nrate = 0.5\n"
      "kinds = [\"plain\", \"wrapper\"]\nfast = true\n");
}

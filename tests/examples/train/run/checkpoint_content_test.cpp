// SPDX-License-Identifier: MIT

#include "train/run/checkpoint_content.h"
#include "train/run/seal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <sstream>
#include <string>

namespace {

using namespace training;
using nlohmann::json;
using testing::HasSubstr;

template <class Action>
std::string flaw_of(const Action& action) {
  try {
    action();
  } catch (const FormatError& flaw) {
    return flaw.what();
  }
  return "nothing";
}

std::string flaw_of_content(const std::string& bytes) {
  return flaw_of([&] { parse_checkpoint(bytes); });
}

Checkpoint some_checkpoint() {
  Checkpoint checkpoint;
  checkpoint.recipe = {{"model", "resnet32"}, {"learning_rate", 0.1}};
  checkpoint.images = 0xfedcba98;
  StepSums step;
  step.steps = 1;
  step.loss = 1.0 / 3;
  step.milliseconds = 2.5;
  checkpoint.state.add(step);
  checkpoint.tensors.insert("network.weight", torch::arange(3));
  return checkpoint;
}

TEST(CheckpointContent, ComesBackAsItWas) {
  const Checkpoint checkpoint = some_checkpoint();
  const Checkpoint found = parse_checkpoint(checkpoint_bytes(checkpoint));
  EXPECT_EQ(found.recipe, checkpoint.recipe);
  EXPECT_EQ(found.images, checkpoint.images);
  EXPECT_EQ(json(found.state), json(checkpoint.state));
  EXPECT_EQ(found.state.since_row.loss, 1.0 / 3);
  const auto weight = found.tensors["network.weight"];
  EXPECT_TRUE(torch::equal(weight, torch::arange(3)));
  EXPECT_EQ(weight.dtype(), torch::kInt64);
}

// --- what is no checkpoint ---------------------------------------------------

std::string flaw_of_description(const torch::Tensor& about) {
  StateDict tensors;
  tensors.insert("about", about);
  return flaw_of_content(archive_of(tensors));
}

/// What is said of a description with a change to it.
std::string flaw_after(const std::function<void(json&)>& change) {
  const Checkpoint checkpoint = some_checkpoint();
  json about = {
      {"recipe", checkpoint.recipe},
      {"images", checkpoint.images},
      {"state", checkpoint.state}};
  change(about);
  return flaw_of_description(training::detail::bytes_of(about.dump()));
}

TEST(CheckpointContent, RunsNothingOfTorchScript) {
  torch::nn::Linear module(1, 1);
  std::ostringstream bytes;
  torch::save(module, bytes);
  EXPECT_EQ(
      flaw_of_content(bytes.str()),
      "its pickle needs Python's __torch__.Module, which is not run");
}

TEST(CheckpointContent, RejectsOtherDescriptions) {
  const auto text = [](const std::string& about) {
    return flaw_of_description(training::detail::bytes_of(about));
  };
  EXPECT_EQ(
      flaw_of_content(archive_of(StateDict())), "it lacks the tensor about");
  const std::string corrupt = "its description is corrupt";
  EXPECT_EQ(text(""), corrupt);
  EXPECT_EQ(text("{"), corrupt);
  EXPECT_EQ(text("\"\xff\""), corrupt);
  EXPECT_EQ(text("[]"), corrupt);
  EXPECT_EQ(text(std::string(1000000, '[')), corrupt);
  EXPECT_EQ(text(std::string(100, '[') + std::string(100, ']')), corrupt);
  EXPECT_EQ(flaw_after([](json& about) { about.erase("images"); }), corrupt);
  EXPECT_EQ(flaw_after([](json& about) { about["images"] = "9"; }), corrupt);
  EXPECT_EQ(flaw_after([](json& about) { about["state"] = json(); }), corrupt);
  EXPECT_EQ(flaw_after([](json&) {}), "nothing");
}

TEST(CheckpointContent, RejectsDescriptionsThatAreNoBytes) {
  const std::string none = "its description is no text";
  EXPECT_EQ(flaw_of_description(torch::zeros({2})), none);
  EXPECT_EQ(flaw_of_description(torch::zeros({1, 2}, torch::kUInt8)), none);
  // one byte for as many as an address has room for
  const auto many = torch::zeros({1}, torch::kUInt8).expand({int64_t{1} << 60});
  EXPECT_EQ(flaw_of([&] { training::detail::text_of(many); }), none);
}

TEST(CheckpointContent, RejectsStepsThatItHasNotMeasured) {
  const std::string other = "it counts other steps than it has measured";
  for (const int64_t steps : {int64_t{-1}, int64_t{2}, int64_t{1} << 62}) {
    EXPECT_EQ(
        flaw_after([&](json& about) { about["state"]["iteration"] = steps; }),
        other);
    EXPECT_EQ(
        flaw_after(
            [&](json& about) { about["state"]["since_row"]["steps"] = steps; }),
        other);
  }
}

// --- its first line ----------------------------------------------------------

std::string flaw_of_seal(const std::string& bytes) {
  return flaw_of([&] { unseal(bytes); });
}

TEST(Seal, ComesOffAsItWasPutOn) {
  for (const std::string content : {"", "\n", "bytes\n"}) {
    EXPECT_EQ(unseal(seal(content)), content);
  }
}

TEST(Seal, ShowsWhatIsDamaged) {
  const std::string whole = seal("content");
  for (size_t index = 0; index < whole.size(); ++index) {
    std::string changed = whole;
    changed[index] ^= 1;
    EXPECT_NE(flaw_of_seal(changed), "nothing") << index;
    EXPECT_NE(flaw_of_seal(whole.substr(0, index)), "nothing") << index;
  }
}

TEST(Seal, NamesFormatsOfOtherVersions) {
  EXPECT_EQ(
      flaw_of_seal("memcnn-checkpoint 1 9 01234567\nand so on"),
      "it has format 1 instead of 3: the version of memcnn_train that wrote it "
      "goes on from it");
}

TEST(Seal, IsShownWithoutItsEscapes) {
  EXPECT_THAT(
      flaw_of_seal("memcnn-checkpoint 3 0 \x1b[2J\n"),
      HasSubstr("instead of \\x1b[2J: it is damaged"));
  EXPECT_EQ(
      flaw_of_seal("memcnn-checkpoint 3 0 " + std::string(100, '0') + "\n"),
      "it is something else or damaged");
}

} // namespace

// SPDX-License-Identifier: MIT

#include "train/weights/python_weights.h"
#include "examples/train/weights/weight_files.h"
#include "train/step/network.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace training;
using namespace memcnn_test;
using testing::HasSubstr;
using testing::StartsWith;

/// The networks of tests/reference/generate_weights.py.
revnet::RevNet network(
    const std::string& name,
    const std::string& engine = "sequence") {
  if (name == "small_revnet") {
    return revnet::RevNet(
        revnet::RevNetOptions().stem(4).widths({4, 6, 8}).blocks({2, 1, 2}));
  }
  if (name == "small_resnet") {
    return revnet::RevNet(revnet::RevNetOptions()
                              .reversible(false)
                              .stem(4)
                              .widths({2, 3, 4})
                              .blocks({1, 2, 1})
                              .bottleneck(true));
  }
  Config config;
  config.model = name;
  config.engine = engine;
  return make_network(config, /*num_classes=*/10);
}

torch::Tensor wave(at::IntArrayRef sizes, double phase) {
  const int64_t count = c10::multiply_integers(sizes);
  const auto sines =
      torch::sin(torch::arange(count).to(torch::kFloat64) + phase);
  return torch::sin(1e4 * sines).view(sizes);
}

bool ends_with(const std::string& text, const std::string& ending) {
  return text.size() >= ending.size() &&
      text.compare(text.size() - ending.size(), ending.size(), ending) == 0;
}

/// fill() of generate_weights.py.
torch::Tensor values_of(const std::string& name, const torch::Tensor& tensor) {
  int64_t phase = 0;
  for (size_t index = 0; index < name.size(); ++index) {
    phase += static_cast<int64_t>(index + 1) * name[index];
  }
  if (ends_with(name, "num_batches_tracked")) {
    return torch::tensor(phase % 1000);
  }
  auto values = wave(tensor.sizes(), static_cast<double>(phase));
  if (tensor.dim() == 4) {
    const auto fan_in = static_cast<double>(tensor[0].numel());
    return values * std::sqrt(2.0 / fan_in);
  }
  return ends_with(name, "running_var") || ends_with(name, "weight")
      ? 0.7 + 0.2 * values
      : 0.1 * values;
}

void fill(const StateDict& state) {
  const torch::NoGradGuard no_grad;
  for (const auto& item : state) {
    torch::Tensor target = item.value();
    target.copy_(values_of(item.key(), target));
  }
}

// --- the same logits as in Python -------------------------------------------

double relative_error(const torch::Tensor& found, const torch::Tensor& wanted) {
  return ((found - wanted).abs().max() / wanted.abs().max()).item<double>();
}

/// Compares with what Python's network of that name makes of the same input, in
/// float64.
void expect_python_logits(
    revnet::RevNet& net,
    const std::string& name,
    torch::ScalarType dtype,
    double tolerance) {
  static const StateDict logits = read_state_dict(reference("logits.pt"));
  const auto input = wave({4, 3, 32, 32}, 0.5).to(dtype);
  const torch::NoGradGuard no_grad;
  for (const char* mode : {"train", "eval"}) {
    net.ptr()->train(mode == std::string("train"));
    const double error = relative_error(
        net(input).to(torch::kFloat64), logits[name + "." + mode]);
    EXPECT_LT(error, tolerance) << name << ", " << mode << ", " << dtype;
  }
}

constexpr double kFloat32 = 5e-5; // of the largest logit; 4e-6 on one processor

class Weights : public testing::TestWithParam<const char*> {};

TEST_P(Weights, GiveTheLogitsOfPython) {
  for (const auto& [dtype, tolerance] :
       {std::pair{torch::kFloat64, 1e-12},
        std::pair{torch::kFloat32, kFloat32}}) {
    auto net = network(GetParam());
    net.ptr()->to(dtype);
    fill(python_state(*net.ptr()));
    expect_python_logits(net, GetParam(), dtype, tolerance);
  }
}

TEST_P(Weights, AreAllNamed) {
  const auto net = network(GetParam());
  const auto state = python_state(*net.ptr());
  EXPECT_EQ(
      state.size(),
      net.ptr()->parameters().size() + net.ptr()->buffers().size());
}

INSTANTIATE_TEST_SUITE_P(
    OfEveryModel,
    Weights,
    testing::Values(
        "resnet32",
        "resnet110",
        "resnet164",
        "revnet38",
        "revnet110",
        "revnet164",
        "small_revnet",
        "small_resnet"),
    [](const auto& tested) { return std::string(tested.param); });

TEST(PythonWeights, AreReadAsTorchSaveWritesThem) {
  for (const std::string name : {"small_revnet", "small_resnet"}) {
    auto net = network(name);
    load_python_weights(reference(name + ".pt"), name, *net.ptr());
    for (const auto& item : python_state(*net.ptr())) {
      // The formula is not computed by the same code on both sides.
      EXPECT_TRUE(torch::allclose(
          item.value().to(torch::kFloat64),
          values_of(item.key(), item.value()).to(torch::kFloat64),
          1e-6))
          << item.key();
    }
    expect_python_logits(net, name, torch::kFloat32, kFloat32);
  }
}

TEST(PythonWeights, AreReadFromACheckpointOfDataParallel) {
  auto net = network("small_revnet");
  const auto state = python_state(*net.ptr());
  state["bn1.num_batches_tracked"].fill_(7);
  load_python_weights(reference("checkpoint.pt"), "a net", *net.ptr());
  for (const auto& item : read_state_dict(reference("small_revnet.pt"))) {
    if (ends_with(item.key(), "num_batches_tracked")) {
      EXPECT_EQ(state[item.key()].item<int64_t>(), 0); // not in the checkpoint
    } else {
      EXPECT_TRUE(torch::equal(state[item.key()], item.value())) << item.key();
    }
  }
}

TEST(PythonWeights, AreTheSameUnderEveryEngine) {
  const auto sequence = python_state(*network("revnet38"));
  for (const char* engine : {"wrapper", "plain"}) {
    const auto state = python_state(*network("revnet38", engine));
    EXPECT_EQ(state.keys(), sequence.keys());
    for (const auto& item : state) {
      EXPECT_TRUE(torch::equal(item.value(), sequence[item.key()]));
    }
  }
}

TEST(PythonWeights, ComeBackFromTheFileTheyAreSavedIn) {
  for (const std::string name : {"small_revnet", "small_resnet", "revnet38"}) {
    const TemporaryFile file;
    const auto net = network(name);
    const auto state = python_state(*net.ptr());
    fill(state);
    save_python_weights(file.path(), *net.ptr());
    EXPECT_FALSE(std::filesystem::exists(file.path() + ".memcnn-partial"));

    const auto written = read_state_dict(file.path());
    EXPECT_EQ(written.keys(), state.keys());
    const auto other = network(name);
    load_python_weights(file.path(), name, *other.ptr());
    for (const auto& item : python_state(*other.ptr())) {
      EXPECT_TRUE(torch::equal(item.value(), state[item.key()])) << item.key();
      EXPECT_EQ(item.value().dtype(), written[item.key()].dtype());
    }
  }
}

TEST(PythonWeights, HaveTheNamesThatPythonGivesThem) {
  for (const std::string name : {"small_revnet", "small_resnet"}) {
    auto found = python_state(*network(name)).keys();
    auto expected = read_state_dict(reference(name + ".pt")).keys();
    std::sort(found.begin(), found.end());
    std::sort(expected.begin(), expected.end());
    EXPECT_EQ(found, expected);
  }
}

// --- weights that do not fit ------------------------------------------------

/// What loading says after `change` has been made to a fitting state dict.
std::string message_after(const std::function<void(StateDict&)>& change) {
  const TemporaryFile file;
  auto state = read_state_dict(reference("small_revnet.pt"));
  change(state);
  write_state_dict(file.path(), state);
  const auto net = network("small_revnet");
  const auto before = python_state(*net.ptr());
  StateDict copies;
  for (const auto& item : before) {
    copies.insert(item.key(), item.value().clone());
  }
  std::string text = message(
      [&] { load_python_weights(file.path(), "revnet38", *net.ptr()); });
  for (const auto& item : before) {
    EXPECT_TRUE(torch::equal(item.value(), copies[item.key()]));
  }
  const auto at = text.find(file.path());
  return at == std::string::npos ? text
                                 : text.replace(at, file.path().size(), "FILE");
}

void rename(StateDict& state, const std::string& from, const std::string& to) {
  StateDict renamed;
  for (const auto& item : state) {
    renamed.insert(item.key() == from ? to : item.key(), item.value());
  }
  state = renamed;
}

TEST(PythonWeights, RejectMissingEntries) {
  EXPECT_EQ(
      message_after([](StateDict& state) { state.erase("fc.bias"); }),
      "expected FILE to have all weights of revnet38, but it lacks "
      "\"fc.bias\". Give the file of a revnet38.");
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state.erase("fc.bias");
        state.erase("layer3.0.basicblock_sub.conv1.weight");
      }),
      "expected FILE to have all weights of revnet38, but it lacks "
      "\"layer3.0.basicblock_sub.conv1.weight\" and 1 more. Give the file of a "
      "revnet38.");
  EXPECT_THAT(
      message_after([](StateDict& state) { state.clear(); }),
      StartsWith("expected FILE to have all weights of revnet38, but it lacks "
                 "\"conv1.weight\" and"));
}

TEST(PythonWeights, RejectUnexpectedEntries) {
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state.insert("layer4.0.conv1.weight", torch::zeros({1}));
      }),
      "expected FILE to have the weights of revnet38 alone, but it has "
      "\"layer4.0.conv1.weight\", too. Give the file of a revnet38.");
  EXPECT_EQ(
      message_after(
          [](StateDict& state) { rename(state, "fc.bias", "head.bias"); }),
      "expected FILE to have all weights of revnet38, but it lacks "
      "\"fc.bias\", and has \"head.bias\". Give the file of a revnet38.");
  EXPECT_THAT(
      message_after(
          [](StateDict& state) { rename(state, "fc.bias", "fc.bais"); }),
      HasSubstr("and has \"fc.bais\" (did you mean \"fc.bias\"?). "));
}

TEST(PythonWeights, RejectOtherShapesAndKinds) {
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state["fc.weight"] = torch::zeros({100, 8});
      }),
      "expected \"fc.weight\" in FILE to have sizes [10, 8] and dtype float32, "
      "but got sizes [100, 8] and dtype float32. Give the file of a revnet38 of "
      "the same sizes.");
  // one value, which would fit each of ten
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state["fc.bias"] = state["fc.bias"].narrow(0, 0, 1);
      }),
      "expected \"fc.bias\" in FILE to have sizes [10] and dtype float32, but "
      "got sizes [1] and dtype float32. Give the file of a revnet38 of the same "
      "sizes.");
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state["fc.bias"] = state["fc.bias"].to(torch::kInt64);
      }),
      "expected \"fc.bias\" in FILE to have dtype float32, or to be a buffer of "
      "values that it holds exactly, but got int64. Give the file of a revnet38 "
      "of the same dtypes.");
}

TEST(PythonWeights, AreRoundedToTheDtypeOfTheNetwork) {
  const TemporaryFile file;
  const auto original = read_state_dict(reference("small_revnet.pt"));
  for (const auto dtype :
       {torch::kFloat64, torch::kFloat16, torch::kBFloat16}) {
    StateDict state;
    for (const auto& item : original) {
      const auto& tensor = item.value();
      state.insert(
          item.key(), tensor.is_floating_point() ? tensor.to(dtype) : tensor);
    }
    write_state_dict(file.path(), state);
    const auto net = network("small_revnet");
    load_python_weights(file.path(), "a net", *net.ptr());
    for (const auto& item : python_state(*net.ptr())) {
      const auto& wanted = original[item.key()];
      EXPECT_EQ(item.value().dtype(), wanted.dtype());
      EXPECT_TRUE(
          torch::equal(item.value(), state[item.key()].to(wanted.dtype())));
    }
  }
}

} // namespace

// SPDX-License-Identifier: MIT

#include "train/weights/module_state.h"

#include <memcnn/memcnn.h>

#include "examples/train/weights/weight_files.h"
#include "packaging/pages/names.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using namespace training;
using namespace memcnn_test;
using testing::Contains;

using testing::UnorderedElementsAreArray;
using torch::nn::Linear;

memcnn::AdditiveCoupling<Linear> coupling() {
  return memcnn::AdditiveCoupling<Linear>(Linear(2, 2), Linear(2, 2));
}

/// Two couplings in a chain, by the blocks' container: with or without wrappers.
template <class Blocks>
struct NetImpl : torch::nn::Module {
  NetImpl() {
    for (int count = 0; count < 2; ++count) {
      if constexpr (std::is_same_v<Blocks, torch::nn::Sequential>) {
        blocks->push_back(memcnn::InvertibleModuleWrapper(coupling()));
      } else {
        blocks->push_back(coupling());
      }
    }
    register_module("blocks", blocks);
    head = register_module("head", Linear(4, 1));
  }

  Blocks blocks;
  Linear head{nullptr};
};
using Bare = NetImpl<memcnn::ReversibleSequence>;
using Wrapped = NetImpl<torch::nn::Sequential>;

void expect_equal(const StateDict& found, const StateDict& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (size_t index = 0; index < found.size(); ++index) {
    EXPECT_TRUE(torch::equal(found[index].value(), expected[index].value()))
        << found[index].key();
  }
}

// --- names ------------------------------------------------------------------

TEST(PythonStateOf, WrapsEachBlockOfASequence) {
  const Bare net;
  EXPECT_THAT(state_of(net).keys(), Contains("blocks.0.Fm.weight"));
  EXPECT_THAT(python_state_of(net).keys(), Contains("blocks.0._fn.Fm.weight"));
  EXPECT_EQ(python_state_of(net).size(), state_of(net).size());
}

TEST(PythonStateOf, WrapsNothingTwice) {
  const Wrapped net;
  EXPECT_THAT(
      python_state_of(net).keys(),
      UnorderedElementsAreArray(state_of(net).keys()));

  const memcnn::ReversibleSequence outer{
      memcnn::ReversibleSequence(coupling()),
      memcnn::InvertibleModuleWrapper(coupling())};
  const auto names = python_state_of(*outer).keys();
  EXPECT_THAT(names, Contains("0.0._fn.Fm.weight"));
  EXPECT_THAT(names, Contains("1._fn.Fm.weight"));
}

TEST(PythonStateOf, HasTheNamesOfPython) {
  // The model of docs/migration.md, whose values the tests of pages compare.
  memcnn::ReversibleSequence blocks;
  for (int count = 0; count < 3; ++count) {
    blocks->push_back(
        memcnn::AdditiveCoupling(pages::Branch(5), pages::Branch(5)));
  }
  std::vector<std::string> expected;
  for (const auto& name : read_state_dict(reference("net.pt")).keys()) {
    if (name.compare(0, 7, "blocks.") == 0) {
      expected.push_back(name.substr(7));
    }
  }
  EXPECT_THAT(
      python_state_of(*blocks).keys(), UnorderedElementsAreArray(expected));
}

template <class Net, class Other>
void expect_loads(const StateDict& written, const Other& other) {
  const TemporaryFile file;
  write_state_dict(file.path(), written);
  Net net;
  load_state_dict(file.path(), net);
  expect_equal(state_of(net), state_of(other));
}

TEST(LoadStateDict, TakesWrappedAndBareBlocksForEachOther) {
  const Bare bare;
  expect_loads<Bare>(state_of(bare), bare);
  expect_loads<Bare>(python_state_of(bare), bare);
  expect_loads<Wrapped>(state_of(bare), bare);
  expect_loads<Wrapped>(python_state_of(bare), bare);
  const Wrapped wrapped;
  expect_loads<Bare>(state_of(wrapped), wrapped);
  expect_loads<Wrapped>(python_state_of(wrapped), wrapped);
}

StateDict with_names(
    const StateDict& state,
    const std::function<std::string(const std::string&)>& renamed) {
  StateDict result;
  for (const auto& item : state) {
    result.insert(renamed(item.key()), item.value());
  }
  return result;
}

TEST(LoadStateDict, TakesNamesOfDataParallelAndCompile) {
  const Bare net;
  for (const std::string prefix :
       {"module.", "_orig_mod.", "module._orig_mod."}) {
    const auto state = with_names(
        python_state_of(net), [&](const auto& name) { return prefix + name; });
    expect_loads<Bare>(state, net);
  }
}

/// A child of its own called "module", beside the same without it.
struct TwoImpl : torch::nn::Module {
  TwoImpl() {
    register_module("a", Linear(1, 1));
    register_module("module", torch::nn::Sequential())
        ->register_module("a", Linear(1, 1));
  }
};

TEST(LoadStateDict, GoesByWholeNamesFirst) {
  TwoImpl net;
  expect_loads<TwoImpl>(state_of(net), net);

  const TemporaryFile file;
  StateDict state = state_of(net);
  state.erase("a.weight");
  state.insert("_fn.a.weight", torch::zeros({1, 1}));
  write_state_dict(file.path(), state);
  // It may be either.
  EXPECT_THAT(
      message([&] { load_state_dict(file.path(), net); }),
      testing::HasSubstr("lacks \"a.weight\", and has \"_fn.a.weight\""));
}

TEST(LoadStateDict, TakesAModuleThatIsUsedTwice) {
  const Linear branch(2, 2);
  const memcnn::AdditiveCoupling one(branch, branch);
  memcnn::ReversibleSequence net(one, one);
  load_state_dict(reference("used_twice.pt"), *net);
  const auto expected = read_state_dict(reference("used_twice.pt"));
  EXPECT_TRUE(torch::equal(branch->weight, expected["1._fn.Gm.weight"]));

  EXPECT_THAT(
      python_state_of(*net).keys(), UnorderedElementsAreArray(expected.keys()));
}

TEST(LoadStateDict, AMisspeltNameOfASharedTensorIsNone) {
  Linear net(2, 2);
  const auto weight = torch::ones({2, 2});
  StateDict state;
  state.insert("weight", weight);
  state.insert("bias", torch::ones({2}));
  state.insert("wieght", weight);
  const TemporaryFile file;
  write_state_dict(file.path(), state);
  EXPECT_THAT(
      message([&] { load_state_dict(file.path(), *net); }),
      testing::HasSubstr("\"wieght\""));
}

/// Python's four names of one branch, and values of their own for each name.
StateDict copies_of(const StateDict& tied) {
  StateDict copies;
  for (const auto& item : tied) {
    copies.insert(item.key(), item.value().clone());
  }
  return copies;
}

TEST(LoadStateDict, TakesEqualCopiesOfWhatIsUsedTwice) {
  const Linear branch(2, 2);
  const memcnn::AdditiveCoupling one(branch, branch);
  memcnn::ReversibleSequence net(one, one);
  const auto tied = read_state_dict(reference("used_twice.pt"));
  const TemporaryFile file;
  write_state_dict(file.path(), copies_of(tied));
  load_state_dict(file.path(), *net);
  EXPECT_TRUE(torch::equal(branch->weight, tied["0._fn.Fm.weight"]));

  auto untied = copies_of(tied);
  untied["1._fn.Fm.weight"].mul_(2);
  write_state_dict(file.path(), untied);
  EXPECT_EQ(
      message([&] { load_state_dict(file.path(), *net); }),
      "expected \"1.Fm.weight\" in " + file.path() +
          " to have the values of \"0.Gm.weight\", with which it is one tensor "
          "in memcnn::ReversibleSequenceImpl, but got others. Give the file of "
          "a memcnn::ReversibleSequenceImpl that shares them, too.");
  EXPECT_TRUE(torch::equal(branch->weight, tied["0._fn.Fm.weight"]));
}

TEST(LoadStateDict, TakesWhatWasSavedOfAModuleThatIsUsedTwice) {
  const auto branch = [] {
    return torch::nn::Sequential(Linear(2, 2), torch::nn::BatchNorm1d(2));
  };
  const auto f = branch();
  memcnn::AdditiveCoupling one(f, f);
  memcnn::ReversibleSequence net(one, one);
  const auto state = copies_of(state_of(*net));
  for (const bool in_python : {true, false}) {
    const TemporaryFile file;
    write_state_dict(
        file.path(), in_python ? python_state_of(*net) : state_of(*net));
    for (const auto& item : state_of(*net)) {
      item.value().data().zero_();
    }
    load_state_dict(file.path(), *net);
    expect_equal(state_of(*net), state);
  }
}

TEST(SaveStateDict, WritesWhatIsSharedOnce) {
  const Linear branch(2, 2);
  const memcnn::AdditiveCoupling one(branch, branch);
  const TemporaryFile file;
  save_state_dict(file.path(), *one);
  const auto saved = read_state_dict(file.path());
  EXPECT_TRUE(saved["Fm.weight"].is_alias_of(saved["Gm.weight"]));
  EXPECT_FALSE(saved["Fm.weight"].is_alias_of(saved["Fm.bias"]));
}

TEST(SaveStateDict, RejectsASecondUseWhoseNameIsForgotten) {
  const auto one = coupling();
  memcnn::ReversibleSequence net;
  net->push_back("1", one);
  net->push_back("b", one);
  const TemporaryFile file;
  const std::string expected =
      "save_state_dict(): expected each block of a sequence with names to be "
      "in it once, but got \"1\" more than once, of which the first name alone "
      "is kept. Add the blocks without names, or give "
      "write_state_dict(path, state_of(module)).";
  EXPECT_EQ(message([&] { save_state_dict(file.path(), *net); }), expected);
  EXPECT_EQ(
      message(
          [&] { save_state_dict(file.path(), *torch::nn::Sequential(net)); }),
      expected);

  write_state_dict(file.path(), state_of(*net));
  load_state_dict(file.path(), *net);
}

// --- values -----------------------------------------------------------------

TEST(LoadStateDict, TakesWhatWasSavedFromAGpu) {
  torch::nn::Module module;
  const auto weight = module.register_parameter("weight", torch::zeros({4}));
  load_state_dict(reference("of_gpu.pt"), module);
  EXPECT_TRUE(torch::equal(weight, torch::arange(4.0)));
}

TEST(LoadStateDict, TakesTensorsOfAnyDtypeAndLayout) {
  const auto saved = read_state_dict(reference("tensors.pt"));
  torch::nn::Module module;
  for (const auto& item : saved) {
    // Laid out as its own, in memory of its own.
    module.register_buffer(
        item.key(),
        torch::zeros_like(item.value()).clone(torch::MemoryFormat::Contiguous));
  }
  load_state_dict(reference("tensors.pt"), module);
  for (const auto& item : saved) {
    EXPECT_TRUE(torch::equal(state_of(module)[item.key()], item.value()))
        << item.key();
  }
}

TEST(LoadStateDict, KeepsWhatIsNotFinite) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  torch::nn::Module module;
  const auto mask = module.register_buffer(
      "mask", torch::tensor({0.0F, -kInfinity, kInfinity, std::nanf("")}));
  const auto expected = mask.clone();
  const TemporaryFile file;
  save_state_dict(file.path(), module);
  mask.zero_();
  load_state_dict(file.path(), module);
  EXPECT_TRUE(torch::allclose(mask, expected, 0, 0, /*equal_nan=*/true));
}

TEST(LoadStateDict, TakesCountersOfAModelInAnotherDtype) {
  torch::nn::BatchNorm1d norm(2);
  norm->num_batches_tracked.fill_(1000);
  const TemporaryFile file;
  save_state_dict(file.path(), *norm);
  // which converts integers as well
  for (const auto dtype : {torch::kFloat64, torch::kFloat16}) {
    torch::nn::BatchNorm1d other(2);
    other->to(dtype);
    load_state_dict(file.path(), *other);
    EXPECT_EQ(other->num_batches_tracked.item<double>(), 1000);
    const TemporaryFile again;
    save_state_dict(again.path(), *other);
    norm->num_batches_tracked.zero_();
    load_state_dict(again.path(), *norm);
    EXPECT_EQ(norm->num_batches_tracked.item<int64_t>(), 1000);
  }
}

TEST(LoadStateDict, RejectsValuesThatAreLostInTheDtype) {
  struct {
    torch::Tensor saved;
    torch::ScalarType dtype;
    const char* wanted;
    const char* got;
  } const cases[] = {
      {torch::tensor({int64_t{1}, int64_t{2049}}),
       torch::kFloat16,
       "float16",
       "int64"},
      {torch::tensor({1.0F, 2.5F}), torch::kInt64, "int64", "float32"},
      {torch::tensor({int64_t{1}, int64_t{300}}),
       torch::kUInt8,
       "uint8",
       "int64"}};
  for (const auto& [saved, dtype, wanted, got] : cases) {
    StateDict state;
    state.insert("a", saved);
    const TemporaryFile file;
    write_state_dict(file.path(), state);
    torch::nn::Module module("Net");
    const auto a = module.register_buffer("a", torch::ones({2}, dtype));
    EXPECT_EQ(
        message([&] { load_state_dict(file.path(), module); }),
        "expected \"a\" in " + file.path() + " to have dtype " + wanted +
            ", or to be a buffer of values that it holds exactly, but got " +
            got + ". Give the file of a Net of the same dtypes.");
    EXPECT_TRUE(torch::equal(a, torch::ones({2}, dtype)));
  }
}

TEST(LoadStateDict, TakesOddNames) {
  torch::nn::Module module;
  for (const char* name :
       {" ",
        "Gr\xc3\xb6\xc3\x9f"
        "e",
        "\"",
        "\n\x1b[2J",
        "\\"}) {
    module.register_buffer(name, torch::rand({2}));
  }
  const auto state = state_of(module);
  StateDict expected;
  for (const auto& item : state) {
    expected.insert(item.key(), item.value().clone());
  }
  const TemporaryFile file;
  save_state_dict(file.path(), module);
  for (const auto& item : state) {
    item.value().data().zero_();
  }
  load_state_dict(file.path(), module);
  expect_equal(state_of(module), expected);
}

// --- what does not fit ------------------------------------------------------

/// What loading says after `change` has been made to a fitting state dict.
std::string message_after(const std::function<void(StateDict&)>& change) {
  const TemporaryFile file;
  Bare net;
  StateDict state = python_state_of(Bare());
  change(state);
  write_state_dict(file.path(), state);
  const auto before = net.head->weight.clone();
  std::string text = message([&] { load_state_dict(file.path(), net); });
  EXPECT_TRUE(torch::equal(net.head->weight, before));
  const auto replace = [&](const std::string& from, const std::string& to) {
    for (auto at = text.find(from); at != std::string::npos;
         at = text.find(from)) {
      text.replace(at, from.size(), to);
    }
  };
  replace(file.path(), "FILE");
  replace(net.name(), "NET");
  return text;
}

void rename(StateDict& state, const std::string& from, const std::string& to) {
  state = with_names(
      state, [&](const auto& name) { return name == from ? to : name; });
}

TEST(LoadStateDict, NamesTheNearestOfAnUnknownName) {
  EXPECT_EQ(
      message_after([](StateDict& state) {
        rename(state, "blocks.1._fn.Gm.weight", "blocks.1._fn.Gm.wieght");
        rename(state, "head.bias", "tail.b");
      }),
      "expected FILE to have all weights of NET, but it lacks "
      "\"blocks.1.Gm.weight\" and 1 more, and has \"blocks.1._fn.Gm.wieght\" "
      "(did you mean \"blocks.1.Gm.weight\"?) and 1 more. Give the file of a "
      "NET.");
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state.insert("heads.bias", torch::zeros({1}));
      }),
      "expected FILE to have the weights of NET alone, but it has "
      "\"heads.bias\" (did you mean \"head.bias\"?), too. Give the file of a "
      "NET.");
}

TEST(LoadStateDict, NamesNothingThatIsNotNear) {
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state.insert(std::string(1000, 'x') + "\n", torch::zeros({1}));
      }),
      "expected FILE to have the weights of NET alone, but it has \"" +
          std::string(80, 'x') + "...\", too. Give the file of a NET.");
}

TEST(LoadStateDict, NamesWhatStandsBeforeAllNames) {
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state =
            with_names(state, [](const auto& name) { return "model." + name; });
      }),
      "expected FILE to have all weights of NET, but all its names begin with "
      "\"model.\", which those of NET do not. Write it anew with "
      "name.removeprefix(\"model.\") for each name.");
  EXPECT_THAT(
      message_after([](StateDict& state) {
        state = with_names(
            state, [](const auto& name) { return "other." + name + ".b"; });
      }),
      testing::HasSubstr("but it lacks \"blocks.0.Fm.weight\" and"));
}

TEST(LoadStateDict, RejectsMissingNames) {
  EXPECT_EQ(
      message_after([](StateDict& state) { state.erase("head.bias"); }),
      "expected FILE to have all weights of NET, but it lacks \"head.bias\". "
      "Give the file of a NET.");
}

TEST(LoadStateDict, RejectsOtherSizes) {
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state["head.weight"] = torch::zeros({4, 1});
      }),
      "expected \"head.weight\" in FILE to have sizes [1, 4] and dtype float32, "
      "but got sizes [4, 1] and dtype float32. Give the file of a NET of the same "
      "sizes.");
}

TEST(LoadStateDict, RejectsTwoNamesForOneTensor) {
  EXPECT_THAT(
      message_after([](StateDict& state) {
        state.insert("blocks.0.Fm.bias", torch::zeros({2}));
      }),
      testing::HasSubstr("but it has \"blocks.0._fn.Fm.bias\""));
}

} // namespace

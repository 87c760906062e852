// SPDX-License-Identifier: MIT

#include "support/modules.h"
#include "support/throws_error.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstddef>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

// A ReversibleSequence as a container: what torch::nn::Sequential can do, and
// as it does it.

namespace memcnn_test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;
using testing::StrEq;

/// A module of the user's own, without an Invertible.
struct NegateImpl final : torch::nn::Cloneable<NegateImpl> {
  void reset() override {}
  torch::Tensor forward(torch::Tensor x) {
    return -x;
  }
  torch::Tensor inverse(torch::Tensor y) {
    return -y;
  }
};
TORCH_MODULE(Negate);

using Coupling = memcnn::AdditiveCoupling<LinearBranch>;

class ReversibleSequence : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }

  static Coupling coupling() {
    return Coupling(LinearBranch(2), LinearBranch(2));
  }

  static std::vector<std::string> names_of(const torch::nn::Module& module) {
    return module.named_children().keys();
  }
};

TEST_F(ReversibleSequence, TakesHoldersPointersAndModules) {
  const Coupling block = coupling();
  memcnn::ReversibleSequence sequence(
      coupling(), std::make_shared<NegateImpl>(), NegateImpl());
  sequence->push_back(block);
  sequence->push_back(block.ptr());
  sequence->push_back(memcnn::AnyInvertible(Negate()));
  EXPECT_EQ(sequence->size(), 6u);
  EXPECT_EQ(sequence[3], block.ptr());
  const torch::Tensor x = torch::randn({3, 4});
  EXPECT_LT(relative_error(sequence->inverse(sequence(x)), x), 1e-5);
}

TEST_F(ReversibleSequence, NamesBlocksAsSequentialDoes) {
  memcnn::ReversibleSequence sequence({{"first", coupling()}, {"2", Negate()}});
  torch::nn::Sequential sequential({{"first", coupling()}, {"2", Negate()}});
  for (const char* name : {"last", "again"}) {
    sequence->push_back(name, coupling());
    sequential->push_back(name, coupling());
  }
  sequence->push_back(Negate());
  sequential->push_back(Negate());
  EXPECT_EQ(names_of(*sequence), names_of(*sequential));
  EXPECT_THAT(
      names_of(*sequence), ElementsAre("first", "2", "last", "again", "4"));
}

TEST_F(ReversibleSequence, TakesAnOrderedDictAndItsOptions) {
  torch::OrderedDict<std::string, memcnn::AnyInvertible> blocks;
  blocks.insert("b", coupling());
  blocks.insert("a", Negate());
  torch::OrderedDict<std::string, Coupling> couplings;
  couplings.insert("c", coupling());
  const auto options = memcnn::ReversibleSequenceOptions().memory_budget(7);
  const memcnn::ReversibleSequence alone(blocks);
  const memcnn::ReversibleSequence sequence(options, blocks, couplings);
  const memcnn::ReversibleSequence listed({{"c", coupling()}}, options);
  EXPECT_THAT(names_of(*alone), ElementsAre("b", "a"));
  EXPECT_THAT(names_of(*sequence), ElementsAre("b", "a", "c"));
  EXPECT_EQ(sequence->options.memory_budget(), 7);
  EXPECT_EQ(listed->options.memory_budget(), 7);
}

TEST_F(ReversibleSequence, ChecksNamesAsRegisterModuleDoes) {
  memcnn::ReversibleSequence sequence({{"a", coupling()}});
  EXPECT_THAT(
      [&] { sequence->push_back("a", coupling()); },
      ThrowsError<c10::Error>(HasSubstr("'a' already defined")));
  EXPECT_THAT(
      [&] { sequence->push_back("a.b", coupling()); },
      ThrowsError<c10::Error>(HasSubstr("must not contain a dot")));
  EXPECT_THAT(
      [&] { sequence->push_back("", coupling()); },
      ThrowsError<c10::Error>(HasSubstr("must not be empty")));
  EXPECT_EQ(sequence->size(), 1u) << "a block that is refused is not added";
}

TEST_F(ReversibleSequence, StatesInterchangeWithSequential) {
  memcnn::ReversibleSequence sequence({{"a", coupling()}, {"b", coupling()}});
  torch::nn::Sequential sequential({{"a", coupling()}, {"b", coupling()}});
  EXPECT_EQ(
      sequence->named_parameters().keys(),
      sequential->named_parameters().keys());
  const torch::Tensor x = torch::randn({3, 4});
  std::stringstream stream;
  torch::save(sequence, stream);
  ASSERT_FALSE(sequential->forward(x).equal(sequence(x)));
  torch::load(sequential, stream);
  EXPECT_TRUE(sequential->forward(x).equal(sequence(x)));

  std::stringstream back;
  torch::save(sequential, back);
  memcnn::ReversibleSequence other({{"a", coupling()}, {"b", coupling()}});
  torch::load(other, back);
  EXPECT_TRUE(other(x).equal(sequence(x)));
}

TEST_F(ReversibleSequence, FindsBlocksByIndexAndType) {
  const Coupling block = coupling();
  memcnn::ReversibleSequence sequence(Negate(), block);
  EXPECT_EQ(&sequence->at<Coupling::Impl>(1), block.get());
  EXPECT_EQ(sequence->ptr<Coupling::Impl>(1), block.ptr());
  EXPECT_EQ(sequence->ptr(1), block.ptr());
  EXPECT_EQ(sequence[1], block.ptr());
  const memcnn::ReversibleSequenceImpl& constant = *sequence;
  EXPECT_EQ(&constant.at<Coupling::Impl>(1), block.get());
  EXPECT_EQ(constant[1], block.ptr());

  EXPECT_THAT(
      [&] { sequence->at<NegateImpl>(1); },
      ThrowsError<c10::Error>(
          HasSubstr("Attempted to cast module of type "),
          HasSubstr(" to type ")));
  EXPECT_THROW(sequence->ptr<Coupling::Impl>(0), c10::Error);
  EXPECT_THAT(
      [&] { sequence[2]; },
      ThrowsError<c10::IndexError>(StrEq(
          "ReversibleSequence::ptr(): expected an index below the number of blocks, "
          "2, but got 2. Count from 0.")));
  EXPECT_THROW(sequence->at<NegateImpl>(2), c10::IndexError);
  EXPECT_THROW(sequence->ptr(2), c10::IndexError);
  EXPECT_THROW(sequence->ptr<NegateImpl>(2), c10::IndexError);
}

TEST_F(ReversibleSequence, IteratesOverItsBlocks) {
  memcnn::ReversibleSequence sequence(coupling(), Negate(), coupling());
  EXPECT_FALSE(sequence->is_empty());
  EXPECT_TRUE(memcnn::ReversibleSequence()->is_empty());
  const torch::Tensor x = torch::randn({3, 4});
  torch::Tensor y = x;
  std::vector<std::shared_ptr<torch::nn::Module>> modules;
  for (memcnn::AnyInvertible& block : *sequence) {
    y = block.forward(y);
    modules.push_back(block.ptr());
  }
  EXPECT_TRUE(y.equal(sequence(x)));
  EXPECT_EQ(modules, sequence->children());
  for (size_t i = sequence->size(); i-- > 0;) {
    y = sequence->begin()[static_cast<std::ptrdiff_t>(i)].inverse(y);
  }
  EXPECT_TRUE(y.equal(sequence->inverse(sequence(x))));
}

TEST_F(ReversibleSequence, ExtendsByContainers) {
  const std::vector<Coupling> couplings{coupling(), coupling()};
  memcnn::ReversibleSequence sequence(Negate{});
  sequence->extend(couplings);
  memcnn::ReversibleSequence all(Negate{});
  all->extend(*sequence);
  EXPECT_THAT(names_of(*all), ElementsAre("0", "1", "2", "3"));
  EXPECT_EQ(all[3], couplings[1].ptr());
  // An AnyInvertible is an AnyModule, which Sequential takes.
  torch::nn::Sequential sequential;
  sequential->extend(*sequence);
  const torch::Tensor x = torch::randn({3, 4});
  EXPECT_TRUE(sequential->forward(x).equal(sequence(x)));
}

TEST_F(ReversibleSequence, ExtendsByItsOwnBlocks) {
  memcnn::ReversibleSequence sequence(coupling(), coupling());
  sequence->extend(*sequence);
  EXPECT_EQ(sequence->size(), 4u);
  EXPECT_THAT(names_of(*sequence), ElementsAre("0", "1"));
}

TEST_F(ReversibleSequence, CloneKeepsNamesAndWhatIsShared) {
  const Coupling twice = coupling();
  const memcnn::ReversibleSequence sequence(
      {{"a", twice}, {"n", Negate()}, {"b", twice}});
  EXPECT_THAT(names_of(*sequence), ElementsAre("a", "n"));
  const auto copy = std::dynamic_pointer_cast<memcnn::ReversibleSequenceImpl>(
      sequence->clone(torch::kCPU));
  EXPECT_EQ(names_of(*copy), names_of(*sequence));
  EXPECT_EQ(copy->size(), 3u);
  EXPECT_EQ((*copy)[0], (*copy)[2]);
  EXPECT_NE((*copy)[0], sequence->ptr(0));
}

TEST(ReversibleSequenceCuda, CloneMovesToTheDevice) {
  if (!torch::cuda::is_available()) {
    GTEST_SKIP() << "no CUDA device";
  }
  const torch::Device device(torch::kCUDA, 0);
  const memcnn::ReversibleSequence sequence(
      {{"a", Coupling(LinearBranch(2))}, {"n", Negate()}});
  const auto copy = sequence->clone(device);
  const auto found = copy->named_parameters();
  EXPECT_EQ(found.keys(), sequence->named_parameters().keys());
  for (const auto& parameter : found) {
    EXPECT_EQ(parameter->device(), device) << parameter.key();
  }
}

// Printing.

TEST_F(ReversibleSequence, PrintsAsSequentialDoes) {
  const memcnn::ReversibleSequence sequence({{"a", Negate()}, {"b", Negate()}});
  const torch::nn::Sequential sequential({{"a", Negate()}, {"b", Negate()}});
  const std::string printed = c10::str(sequence);
  const std::string name = "memcnn::ReversibleSequence";
  EXPECT_EQ(printed.substr(0, name.size()), name);
  const std::string expected = c10::str(sequential);
  EXPECT_EQ(
      printed.substr(name.size()),
      expected.substr(std::string("torch::nn::Sequential").size()));
}

TEST_F(ReversibleSequence, PrintsRepeatedBlocksOnce) {
  memcnn::ReversibleSequence inner(
      {{"a", Coupling(LinearBranch(1))}, {"b", Coupling(LinearBranch(1))}});
  memcnn::ReversibleSequence sequence(coupling(), coupling(), coupling());
  sequence->push_back(inner);
  sequence->push_back("last", coupling());
  sequence->options.memory_format(torch::MemoryFormat::Contiguous);
  const auto branches = [](const std::string& indentation, int size) {
    std::string text = "memcnn::AdditiveCoupling(split_dim=1)(\n";
    for (const char* name : {"Fm", "Gm"}) {
      text += c10::str(
          indentation + "  (",
          name,
          "): memcnn_test::LinearBranchImpl(\n",
          indentation + "    (linear): torch::nn::Linear(in_features=",
          size,
          ", out_features=",
          size,
          ", bias=true)\n",
          indentation + "  )\n");
    }
    return text + indentation + ")\n";
  };
  EXPECT_EQ(
      c10::str(*sequence),
      "memcnn::ReversibleSequence(memory_format=Contiguous)(\n"
      "  (0-2): 3 x " +
          branches("  ", 2) + "  (3): memcnn::ReversibleSequence(\n" +
          "    (a): " + branches("    ", 1) + "    (b): " +
          branches("    ", 1) + "  )\n  (last): " + branches("  ", 2) + ")");
}

TEST_F(ReversibleSequence, PrintsInsideAModuleAsLibTorchDoes) {
  const memcnn::ReversibleSequence sequence(Negate{}, Negate{});
  EXPECT_EQ(
      c10::str(torch::nn::Sequential(sequence)),
      "torch::nn::Sequential(\n"
      "  (0): memcnn::ReversibleSequence(\n"
      "    (0): memcnn_test::(anonymous namespace)::NegateImpl\n"
      "    (1): memcnn_test::(anonymous namespace)::NegateImpl\n"
      "  )\n"
      ")");
}

TEST_F(ReversibleSequence, PrintsTheOptionsThatAreSet) {
  memcnn::ReversibleSequence sequence;
  const auto printed = [&] {
    return c10::str(sequence);
  };
  EXPECT_EQ(printed(), "memcnn::ReversibleSequence");
  sequence->options.memory_budget(7);
  EXPECT_EQ(printed(), "memcnn::ReversibleSequence(memory_budget=7)");
  sequence->options.preserve_rng_state(false).debug(true).disable(true);
  sequence->options.memory_format(torch::MemoryFormat::ChannelsLast);
  EXPECT_EQ(
      printed(),
      "memcnn::ReversibleSequence(preserve_rng_state=false, debug=true, "
      "disable=true, memory_budget=7, memory_format=ChannelsLast)");
}

TEST_F(ReversibleSequence, PrintsWhatItsBudgetKept) {
  memcnn::ReversibleSequence sequence(coupling(), coupling());
  sequence->options.memory_budget(1 << 20);
  const torch::Tensor x = leaf({2, 4}, torch::kFloat);
  sequence(x);
  EXPECT_THAT(
      c10::str(sequence),
      HasSubstr("Sequence(memory_budget=1048576, kept=2 blocks)(\n"));
  EXPECT_THAT(
      c10::str(sequence->kept()),
      HasSubstr(
          " MiB: 2 blocks, sparing 100 % of the multiply-adds of second runs"));
  sequence->options.memory_budget(2 * 2 * 4); // of one result
  sequence(x);
  EXPECT_THAT(c10::str(sequence), HasSubstr(", kept=1 result)(\n"));
  sequence->options.memory_budget(0);
  sequence(x);
  EXPECT_THAT(c10::str(sequence), Not(HasSubstr("kept")));
}

TEST(KeptActivations, AreSummedAndPrinted) {
  memcnn::KeptActivations sum;
  EXPECT_EQ(c10::str(sum), "nothing");
  memcnn::KeptActivations block;
  block.bytes = 3 << 20;
  block.blocks = 1;
  EXPECT_EQ(c10::str(block), "3.00 MiB: 1 block") << "without dear operators";
  memcnn::KeptActivations results;
  results.bytes = 1 << 19;
  results.results = 12;
  results.multiply_adds = 400;
  results.spared = 300;
  sum += block;
  sum += results;
  sum += results;
  EXPECT_EQ(
      c10::str(sum),
      "4.00 MiB: 1 block and 24 results, sparing 75 % of the multiply-adds of "
      "second runs");
}

TEST_F(ReversibleSequence, AnyInvertibleRefusesANullPointer) {
  EXPECT_THAT(
      [] { memcnn::AnyInvertible(std::shared_ptr<NegateImpl>()); },
      ThrowsError<c10::ValueError>(
          StrEq("AnyInvertible::AnyInvertible(): expected a module, but got a "
                "null pointer. Create the module first, as std::make_shared "
                "does.")));
}

} // namespace
} // namespace memcnn_test

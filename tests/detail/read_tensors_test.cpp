// SPDX-License-Identifier: MIT
//
// Frozen parameters and buffers of layers without branches.

#include "../support/modules.h"
#include "../support/throws_error.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstddef>
#include <string>
#include <vector>

namespace memcnn_test {
namespace {

using memcnn::AnyInvertible;
using testing::HasSubstr;
using torch::Tensor;

/// A layer, and what it reads besides what it trains.
struct Reader {
  AnyInvertible layer;
  std::string module;
  std::vector<std::string> names;
};

template <class Layer>
Layer frozen(Layer layer) {
  for (Tensor& parameter : layer->parameters()) {
    parameter.set_requires_grad(false);
  }
  return layer;
}

memcnn::Conv1x1 conv1x1(memcnn::Parametrization kind) {
  return memcnn::Conv1x1(4, memcnn::Conv1x1Options().parametrization(kind));
}

std::vector<Reader> readers() {
  memcnn::ActNorm half_frozen(4);
  half_frozen->bias.set_requires_grad(false);
  const std::string matrix = "memcnn::Conv1x1Impl";
  return {
      {half_frozen, "memcnn::ActNormImpl", {"bias"}},
      {frozen(memcnn::ActNorm(4)),
       "memcnn::ActNormImpl",
       {"bias", "log_scale"}},
      {conv1x1(memcnn::kOrthogonal), matrix, {"base"}},
      {conv1x1(memcnn::kLU), matrix, {"permutation", "sign"}},
      {frozen(conv1x1(memcnn::kPlain)), matrix, {"weight"}},
      {memcnn::OrthogonalDownsampling(4, {1, 1}),
       "memcnn::OrthogonalDownsamplingImpl",
       {"base"}},
      {memcnn::Permutation(4), "memcnn::PermutationImpl", {"permutation"}}};
}

/// Where a layer runs. A coupling trains, whatever the layer does.
enum class Place { kSequence, kNested, kWrapped, kTurnedRound };

Tensor run(Place place, const AnyInvertible& layer, const Tensor& x) {
  const auto coupling = [] {
    return memcnn::AdditiveCoupling(SmoothBranch(2));
  };
  memcnn::ReversibleSequence sequence;
  sequence->push_back(coupling());
  switch (place) {
    case Place::kSequence:
      sequence->push_back(layer);
      return sequence(x);
    case Place::kNested:
      sequence->push_back(memcnn::ReversibleSequence(layer));
      return sequence(x);
    case Place::kTurnedRound:
      sequence->push_back(memcnn::InverseOf(layer));
      return sequence->inverse(x);
    default:
      sequence->push_back(layer);
      return memcnn::InvertibleModuleWrapper(sequence)->forward(x);
  }
}

Tensor registered(const AnyInvertible& layer, const std::string& name) {
  const auto parameters = layer.ptr()->named_parameters();
  return parameters.contains(name) ? parameters[name]
                                   : layer.ptr()->named_buffers()[name];
}

class ReadTensors : public testing::TestWithParam<Place> {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }

  /// Changes each tensor that a layer reads between forward and backward.
  template <class Change, class Expect>
  void for_each_change(const Change& change, const Expect& expect) {
    for (const Reader& reader : readers()) {
      for (const std::string& name : reader.names) {
        SCOPED_TRACE(reader.module + " " + name);
        const Tensor loss = run(GetParam(), reader.layer, x * 2).sum();
        change(registered(reader.layer, name));
        expect([&] { loss.backward(); }, reader.module, name);
      }
    }
  }

  const Tensor x = leaf({2, 4, 3, 3}, torch::kFloat);
};

std::string name_of_place(const testing::TestParamInfo<Place>& info) {
  constexpr const char* kNames[] = {
      "Sequence", "Nested", "Wrapped", "TurnedRound"};
  return kNames[static_cast<size_t>(info.param)];
}

INSTANTIATE_TEST_SUITE_P(
    Places,
    ReadTensors,
    testing::Values(
        Place::kSequence,
        Place::kNested,
        Place::kWrapped,
        Place::kTurnedRound),
    name_of_place);

TEST_P(ReadTensors, WrittenInBetweenAreAnError) {
  for_each_change(
      [](const Tensor& tensor) { tensor.copy_(tensor.flip(0)); },
      [](const auto& backward, const auto& module, const auto& name) {
        EXPECT_THAT(
            backward,
            ThrowsError<c10::Error>(
                HasSubstr(
                    "expected the parameters and buffers that forward read "
                    "to be unchanged in backward, but got a change of '" +
                    name + "'"),
                HasSubstr("of module '" + module + "'")));
      });
}

TEST_P(ReadTensors, OfOtherMemoryAreAnError) {
  for_each_change(
      [](const Tensor& tensor) { tensor.set_data(tensor.clone()); },
      [](const auto& backward, const auto& /*module*/, const auto& name) {
        EXPECT_THAT(
            backward,
            ThrowsError<c10::Error>(HasSubstr(
                "expected '" + name +
                "' to keep its memory from forward to backward")));
      });
}

TEST_P(ReadTensors, WrittenInBetweenAreAnErrorForSecondDerivatives) {
  for (const Reader& reader : readers()) {
    SCOPED_TRACE(reader.module);
    const Tensor loss = run(GetParam(), reader.layer, x * 2).square().sum();
    const Tensor tensor = registered(reader.layer, reader.names[0]);
    tensor.copy_(tensor.flip(0));
    EXPECT_THAT(
        [&] {
          torch::autograd::grad(
              {loss}, {x}, {}, /*retain_graph=*/true, /*create_graph=*/true);
        },
        ThrowsError<c10::Error>(
            HasSubstr("but got a change of '" + reader.names[0] + "'")));
  }
}

TEST_P(ReadTensors, MayChangeBetweenTwoSteps) {
  for (const Reader& reader : readers()) {
    for (int step = 0; step < 2; ++step) {
      const Tensor loss = run(GetParam(), reader.layer, x * 2).square().sum();
      loss.backward({}, /*retain_graph=*/true);
      loss.backward();
      const Tensor tensor = registered(reader.layer, reader.names[0]);
      tensor.copy_(tensor.flip(0));
    }
  }
}

} // namespace
} // namespace memcnn_test

// SPDX-License-Identifier: MIT
#pragma once

#include "autocast.h"
#include "gradcheck.h"
#include "reference.h"
#include "throws_error.h"
#include "tolerances.h"
#include "twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace memcnn_test {

/// The body of every test of the suite, for one kind of module on one device.
template <class T>
class InvertibleChecks {
 public:
  using Module = decltype(T::make());
  using Direction = memcnn::Direction;

  explicit InvertibleChecks(torch::Device device) : device_(device) {}

  void inverse_recovers_input(torch::ScalarType dtype) const {
    const torch::NoGradGuard no_grad;
    Module module = make(dtype);
    const torch::Tensor x = input(dtype);
    const torch::Tensor y = module->forward(x.clone());
    EXPECT_EQ(y.scalar_type(), dtype);
    EXPECT_EQ(y.sizes(), at::IntArrayRef(shape(Direction::kInverse)));
    if (y.sizes() == x.sizes()) {
      EXPECT_GT(relative_error(y, x), 0.01) << "the module does nothing";
    }
    const torch::Tensor again = module->inverse(y.clone());
    EXPECT_EQ(again.scalar_type(), dtype);
    EXPECT_LT(relative_error(again, x), round_trip_tolerance(dtype));
    const torch::Tensor z = input(dtype, Direction::kInverse);
    EXPECT_LT(
        relative_error(module->forward(module->inverse(z.clone())), z),
        round_trip_tolerance(dtype));
  }

  void gradients_match_plain_autograd(torch::ScalarType dtype) const {
    for (const Direction direction : kBoth) {
      Module plain = make(dtype);
      auto saving = wrap(twin_of(plain));
      run_plainly(plain);
      const torch::Tensor x = input(dtype, direction).requires_grad_();
      const torch::Tensor weights = input(dtype, memcnn::opposite(direction));
      const torch::Tensor expected =
          apply(plain, direction, made_by_a_layer(x));
      const torch::Tensor found = apply(saving, direction, made_by_a_layer(x));
      EXPECT_LT(relative_error(found, expected), round_trip_tolerance(dtype));
      EXPECT_THAT(
          found.grad_fn()->name(), testing::HasSubstr("InvertibleFunction"));
      EXPECT_THAT(
          expected.grad_fn()->name(),
          testing::Not(testing::HasSubstr("InvertibleFunction")));
      const auto expected_gradients =
          gradients({(expected * weights).sum()}, x, plain->parameters());
      const auto found_gradients =
          gradients({(found * weights).sum()}, x, saving->parameters());
      EXPECT_TRUE(found_gradients[0].defined());
      EXPECT_LT(
          relative_error(found_gradients, expected_gradients),
          gradient_tolerance(dtype))
          << memcnn::name_of(direction);
    }
  }

  void gradients_match_under_autocast() const {
    for (const Direction direction : kBoth) {
      SCOPED_TRACE(memcnn::name_of(direction));
      Module plain = make(torch::kFloat);
      auto saving = wrap(twin_of(plain));
      run_plainly(plain);
      const torch::Tensor x = input(torch::kFloat, direction).requires_grad_();
      const torch::Tensor weights =
          input(torch::kFloat, memcnn::opposite(direction));
      const auto run = [&](auto& module) {
        const Autocast autocast(device_.type(), torch::kBFloat16);
        return apply(module, direction, made_by_a_layer(x));
      };
      const torch::Tensor expected = run(plain);
      const torch::Tensor found = run(saving);
      EXPECT_EQ(found.scalar_type(), torch::kFloat);
      EXPECT_LT(relative_error(found, expected), kRoundTripFloat32);
      const double casts = relative_error(apply(plain, direction, x), expected);
      if (kUsesAutocast) {
        EXPECT_GT(casts, 1e-4) << "the branches have not computed in bfloat16";
      } else {
        EXPECT_EQ(casts, 0) << "a layer has computed in bfloat16";
      }
      EXPECT_LT(
          relative_error(
              gradients({(found * weights).sum()}, x, saving->parameters()),
              gradients({(expected * weights).sum()}, x, plain->parameters())),
          kGradientAutocast);
    }
  }

  void gradcheck_in_float64() const {
    for (const Direction direction : kBoth) {
      auto saving = wrap(make(torch::kDouble));
      const torch::Tensor x = input(torch::kDouble, direction).requires_grad_();
      std::vector<torch::Tensor> leaves = saving->parameters();
      leaves.push_back(x);
      EXPECT_TRUE(gradcheck(
          [&] { return apply(saving, direction, made_by_a_layer(x)); }, leaves))
          << memcnn::name_of(direction);
    }
  }

  void second_derivatives_match_plain_autograd() const {
    for (const Direction direction : kBoth) {
      Module plain = make(torch::kDouble);
      auto saving = wrap(twin_of(plain));
      run_plainly(plain);
      const torch::Tensor x = input(torch::kDouble, direction).requires_grad_();
      const auto second = [&](const torch::Tensor& y, const auto& parameters) {
        return second_derivatives(y.pow(3).sum(), x, parameters);
      };
      const auto expected = second(
          apply(plain, direction, made_by_a_layer(x)), plain->parameters());
      const auto found = second(
          apply(saving, direction, made_by_a_layer(x)), saving->parameters());
      EXPECT_TRUE(found[0].defined());
      EXPECT_LT(relative_error(found, expected), kSecondDerivativeFloat64)
          << memcnn::name_of(direction);
    }
  }

  void clone_is_deep() const {
    Module original = make(torch::kFloat);
    bool mode = false;
    for (const auto& part : original->modules()) {
      part->train(mode);
      mode = !mode;
    }
    Module copy = twin_of(original);
    EXPECT_EQ(printed(copy), printed(original));
    EXPECT_EQ(keys(*copy), keys(*original));
    const auto parts = original->modules();
    const auto copied_parts = copy->modules();
    ASSERT_EQ(copied_parts.size(), parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
      EXPECT_NE(copied_parts[i], parts[i]) << parts[i]->name();
      EXPECT_EQ(copied_parts[i]->is_training(), parts[i]->is_training())
          << parts[i]->name();
    }
    EXPECT_TRUE(all_equal(copy->parameters(), original->parameters()));
    EXPECT_TRUE(all_equal(copy->buffers(), original->buffers()));

    const torch::NoGradGuard no_grad;
    original->eval();
    copy->eval();
    const torch::Tensor x = input(torch::kFloat);
    const torch::Tensor y = original->forward(x);
    EXPECT_TRUE(copy->forward(x).equal(y));
    for (torch::Tensor& parameter : copy->parameters()) {
      parameter.add_(1);
    }
    EXPECT_TRUE(original->forward(x).equal(y));
    EXPECT_EQ(copy->forward(x).equal(y), copy->parameters().empty())
        << "parameters are not used";
  }

  void survives_save_and_load() const {
    Module saved = make(torch::kFloat);
    const torch::Tensor x = input(torch::kFloat);
    saved->forward(x); // moves the statistics of a batch norm
    std::stringstream stream;
    torch::save(saved, stream);
    Module loaded = make(torch::kFloat);
    ASSERT_EQ(
        all_equal(loaded->parameters(), saved->parameters()),
        saved->parameters().empty());
    torch::load(loaded, stream);
    EXPECT_TRUE(all_equal(loaded->parameters(), saved->parameters()));
    EXPECT_TRUE(all_equal(loaded->buffers(), saved->buffers()));
    saved->eval();
    loaded->eval();
    EXPECT_TRUE(loaded->forward(x).equal(saved->forward(x)));
  }

  void prints_its_options() const {
    EXPECT_THAT(printed(make(torch::kFloat)), testing::HasSubstr(T::printed()));
  }

  void rejects_integer_input() const {
    Module module = make(torch::kFloat);
    auto saving = wrap(module);
    for (const Direction direction : kBoth) {
      const torch::Tensor x = torch::ones(
          shape(direction), torch::TensorOptions(torch::kLong).device(device_));
      const auto is_rejected = ThrowsError<c10::TypeError>(
          testing::HasSubstr(memcnn::name_of(direction)),
          testing::HasSubstr("expected a tensor of floating point values"),
          testing::HasSubstr("Long"));
      EXPECT_THAT([&] { apply(module, direction, x); }, is_rejected);
      EXPECT_THAT([&] { apply(saving, direction, x); }, is_rejected);
    }
  }

  void accepts_empty_batch() const {
    Module module = make(torch::kFloat);
    auto saving = wrap(module);
    for (const Direction direction : kBoth) {
      const torch::Tensor x = empty_batch(direction).requires_grad_();
      const auto sizes = empty_batch(memcnn::opposite(direction)).sizes().vec();
      EXPECT_EQ(apply(module, direction, x).sizes(), at::IntArrayRef(sizes));
      const torch::Tensor y = apply(saving, direction, made_by_a_layer(x));
      EXPECT_EQ(y.sizes(), at::IntArrayRef(sizes));
      y.sum().backward();
      ASSERT_TRUE(x.grad().defined());
      EXPECT_EQ(x.grad().sizes(), x.sizes());
      if constexpr (kHasLogDet) {
        EXPECT_EQ(with_log_det(module, direction, x).log_det.numel(), 0);
      }
    }
  }

  void releases_input_storage() const {
    for (const Direction direction : kBoth) {
      auto saving = wrap(make(torch::kDouble));
      const torch::Tensor leaf =
          input(torch::kDouble, direction).requires_grad_();
      const torch::Tensor x = made_by_a_layer(leaf);
      const torch::Tensor value = x.detach().clone();
      // Not a handle: an owner would keep the memory.
      const c10::StorageImpl* storage = x.storage().unsafeGetStorageImpl();
      const size_t size = storage->nbytes();

      const torch::Tensor y = apply(saving, direction, x);
      EXPECT_EQ(storage->nbytes(), 0u) << saving->input_kept_because();
      EXPECT_EQ(storage->data(), nullptr);
      EXPECT_GE(y.storage().nbytes(), size);

      y.sum().backward();
      ASSERT_EQ(x.storage().unsafeGetStorageImpl(), storage);
      EXPECT_EQ(storage->nbytes(), size);
      EXPECT_LT(relative_error(x, value), kRoundTripFloat64);
    }
  }

  void fits_into_sequential_and_any_module() const {
    const torch::NoGradGuard no_grad;
    Module module = make(torch::kFloat);
    auto saving = wrap(module);
    module->eval();
    const torch::Tensor x = input(torch::kFloat);
    const torch::Tensor once = module->forward(x);
    EXPECT_TRUE(torch::nn::AnyModule(module).forward(x).equal(once));
    EXPECT_TRUE(torch::nn::AnyModule(saving).forward(x).equal(once));
    torch::nn::Sequential sequential(torch::nn::Tanh(), module);
    const torch::Tensor of_tanh = module->forward(torch::tanh(x));
    EXPECT_TRUE(sequential->forward(x).equal(of_tanh));
    EXPECT_TRUE(torch::nn::Sequential(torch::nn::Tanh(), saving)
                    ->forward(x)
                    .equal(of_tanh));
    if constexpr (std::is_base_of_v<
                      memcnn::Invertible,
                      typename Module::ContainedType>) {
      EXPECT_NE(
          std::dynamic_pointer_cast<memcnn::Invertible>(sequential->ptr(1)),
          nullptr);
    }
  }

  void moves_with_to() const {
    Module module = T::make();
    for (const torch::ScalarType dtype : {torch::kDouble, torch::kFloat}) {
      module->to(device_, dtype);
      for (const torch::Tensor& parameter : module->parameters()) {
        EXPECT_EQ(parameter.scalar_type(), dtype);
        EXPECT_EQ(parameter.device().type(), device_.type());
      }
      const torch::NoGradGuard no_grad;
      const torch::Tensor x = input(dtype);
      const torch::Tensor y = module->forward(x);
      EXPECT_EQ(y.scalar_type(), dtype);
      EXPECT_LT(
          relative_error(module->inverse(y), x), round_trip_tolerance(dtype));
    }
  }

  /// The value is compared for each sample by itself, and, since samples mix where
  /// batch normalisation trains, for all of them together.
  void log_det_matches_jacobian() const {
    if constexpr (!kHasLogDet) {
      GTEST_SKIP() << "no log-determinant";
    } else {
      for (const Direction direction : kBoth) {
        SCOPED_TRACE(memcnn::name_of(direction));
        Module module = make(torch::kDouble);
        run_plainly(module);
        const torch::Tensor x = input(torch::kDouble, direction);
        const auto [y, log_det] = with_log_det(module, direction, x);
        EXPECT_EQ(log_det.sizes(), at::IntArrayRef({x.size(0)}));
        EXPECT_EQ(log_det.scalar_type(), torch::kDouble);
        Module twin = twin_of(module);
        EXPECT_TRUE(apply(twin, direction, x).equal(y));
        expect_log_det(log_det.sum(), log_det_of(module, direction, x));

        module->eval();
        const torch::Tensor of_each =
            with_log_det(module, direction, x).log_det;
        for (int64_t i = 0; i < x.size(0); ++i) {
          expect_log_det(
              of_each[i], log_det_of(module, direction, x.narrow(0, i, 1)));
        }
        const auto back = with_log_det(
            module, memcnn::opposite(direction), apply(module, direction, x));
        expect_log_det(back.log_det.sum(), -of_each.sum());
      }
    }
  }

  /// Each sample weights its log-determinant otherwise, so that a mean shows, or
  /// another sample's weight.
  void log_det_gradients_match_plain_autograd() const {
    if constexpr (!kHasLogDet) {
      GTEST_SKIP() << "no log-determinant";
    } else {
      for (const Direction direction : kBoth) {
        Module plain = make(torch::kDouble);
        run_plainly(plain);
        auto wrapped = wrap(twin_of(plain));
        memcnn::ReversibleSequence sequence(twin_of(plain));
        for (const Uses uses :
             {Uses{true, true}, {false, true}, {true, false}}) {
          SCOPED_TRACE(
              std::string(memcnn::name_of(direction)) +
              (uses.output ? " output" : "") +
              (uses.log_det ? " log_det" : ""));
          const torch::Tensor x =
              input(torch::kDouble, direction).requires_grad_();
          const auto expected = log_det_gradients(plain, direction, x, uses);
          EXPECT_LT(
              relative_error(
                  log_det_gradients(wrapped, direction, x, uses), expected),
              kGradientFloat64);
          EXPECT_LT(
              relative_error(
                  log_det_gradients(sequence, direction, x, uses), expected),
              kGradientFloat64);
        }
      }
    }
  }

  void log_det_gradcheck_in_float64() const {
    if constexpr (!kHasLogDet) {
      GTEST_SKIP() << "no log-determinant";
    } else {
      for (const Direction direction : kBoth) {
        auto saving = wrap(make(torch::kDouble));
        const torch::Tensor x =
            input(torch::kDouble, direction).requires_grad_();
        std::vector<torch::Tensor> leaves = saving->parameters();
        leaves.push_back(x);
        const auto run = [&] {
          const auto result =
              with_log_det(saving, direction, made_by_a_layer(x));
          return torch::cat({result.output.flatten(), result.log_det});
        };
        EXPECT_TRUE(gradcheck(run, leaves)) << memcnn::name_of(direction);
      }
    }
  }

  void log_det_second_derivatives_match_plain_autograd() const {
    if constexpr (!kHasLogDet) {
      GTEST_SKIP() << "no log-determinant";
    } else {
      for (const Direction direction : kBoth) {
        Module plain = make(torch::kDouble);
        run_plainly(plain);
        auto wrapped = wrap(twin_of(plain));
        memcnn::ReversibleSequence sequence(twin_of(plain));
        const torch::Tensor x =
            input(torch::kDouble, direction).requires_grad_();
        const auto second = [&](auto& module) {
          const auto result =
              with_log_det(module, direction, made_by_a_layer(x));
          return second_derivatives(
              result.output.pow(3).sum() +
                  (sample_weights() * result.log_det).square().sum(),
              x,
              module->parameters());
        };
        const auto expected = second(plain);
        EXPECT_LT(
            relative_error(second(wrapped), expected), kSecondDerivativeFloat64)
            << memcnn::name_of(direction);
        EXPECT_LT(
            relative_error(second(sequence), expected),
            kSecondDerivativeFloat64)
            << memcnn::name_of(direction);
      }
    }
  }

  void log_det_under_autocast() const {
    if constexpr (!kHasLogDet) {
      GTEST_SKIP() << "no log-determinant";
    } else {
      for (const Direction direction : kBoth) {
        SCOPED_TRACE(memcnn::name_of(direction));
        Module plain = make(torch::kFloat);
        auto saving = wrap(twin_of(plain));
        run_plainly(plain);
        const torch::Tensor x =
            input(torch::kFloat, direction).requires_grad_();
        const auto run = [&](auto& module) {
          const Autocast autocast(device_.type(), torch::kBFloat16);
          return with_log_det(module, direction, made_by_a_layer(x));
        };
        const auto expected = run(plain);
        const auto found = run(saving);
        EXPECT_EQ(found.output.scalar_type(), torch::kFloat);
        EXPECT_EQ(found.log_det.scalar_type(), torch::kFloat);
        EXPECT_LT(
            relative_error(found.log_det, expected.log_det), kRoundTripFloat32);
        EXPECT_LT(
            relative_error(
                gradients({loss_of(found)}, x, saving->parameters()),
                gradients({loss_of(expected)}, x, plain->parameters())),
            kGradientAutocast);
      }
    }
  }

  void log_det_is_computed_in(torch::ScalarType dtype) const {
    if constexpr (!kHasLogDet) {
      GTEST_SKIP() << "no log-determinant";
    } else {
      for (const Direction direction : kBoth) {
        SCOPED_TRACE(memcnn::name_of(direction));
        Module narrow = make(dtype);
        Module wide = twin_of(narrow);
        wide->to(torch::kDouble);
        const torch::Tensor x = input(dtype, direction).requires_grad_();
        const torch::Tensor found = with_log_det(narrow, direction, x).log_det;
        EXPECT_EQ(found.scalar_type(), torch::kFloat);
        const torch::Tensor expected =
            with_log_det(wide, direction, x.detach().to(torch::kDouble))
                .log_det;
        EXPECT_LT(log_det_error(found, expected), log_det_tolerance(dtype));
      }
    }
  }

  /// The stored values were computed by Python MemCNN's wrapper around the same
  /// module, with the same weights under the same names.
  void matches_python_reference(torch::ScalarType dtype) const {
    const double tolerance =
        dtype == torch::kDouble ? kReferenceFloat64 : kReferenceFloat32;
    auto reference = load_reference(
        std::string(T::kReference) +
        (dtype == torch::kDouble ? "_float64" : "_float32"));
    for (auto& [key, tensor] : reference) {
      tensor = tensor.to(device_);
    }
    for (const bool wrapped : {false, true}) {
      for (const Direction direction : kBoth) {
        SCOPED_TRACE(
            std::string(wrapped ? "wrapped " : "plain ") +
            memcnn::name_of(direction));
        auto saving = wrap(make(dtype));
        load_weights(*saving, reference);
        saving->options.disable(!wrapped);
        const std::string prefix =
            std::string(memcnn::name_of(direction)) + ".";
        const torch::Tensor x =
            reference.at(prefix + "input").clone().requires_grad_();
        ASSERT_EQ(x.sizes(), at::IntArrayRef(T::shape()));
        const torch::Tensor y = apply(saving, direction, made_by_a_layer(x));
        EXPECT_LT(
            relative_error(y, reference.at(prefix + "output")), tolerance);

        y.backward(reference.at(prefix + "grad_output"));
        EXPECT_LT(
            relative_error(x.grad(), reference.at(prefix + "grad_input")),
            tolerance);
        for (const auto& parameter : saving->named_parameters()) {
          EXPECT_LT(
              relative_error(
                  parameter->grad(),
                  reference.at(prefix + "grad." + parameter.key())),
              tolerance)
              << parameter.key();
        }
        const torch::NoGradGuard no_grad;
        saving->options.disable(true);
        EXPECT_LT(
            relative_error(
                apply(
                    saving,
                    memcnn::opposite(direction),
                    reference.at(prefix + "output")),
                reference.at(prefix + "undone")),
            tolerance);
      }
    }
  }

 private:
  static constexpr Direction kBoth[] = {
      Direction::kForward,
      Direction::kInverse};

  static constexpr bool kHasLogDet = requires(Module module, torch::Tensor x) {
    module->forward_with_log_det(x);
    module->inverse_with_log_det(x);
  };

  /// Whether autocast changes what it computes: whether it has branches.
  static constexpr bool kUsesAutocast = [] {
    if constexpr (requires { T::kUsesAutocast; }) {
      return T::kUsesAutocast;
    }
    return true;
  }();

  /// What a loss takes into account.
  struct Uses {
    bool output;
    bool log_det;
  };

  Module make(torch::ScalarType dtype) const {
    Module module = T::make();
    module->to(device_, dtype);
    return module;
  }

  /// With ordinary autograd, also where a part of it saves memory by itself.
  static void run_plainly(Module& module) {
    memcnn::configure(*module, [](auto& options) { options.disable(true); });
  }

  /// The sizes that a map takes.
  static std::vector<int64_t> shape(Direction direction) {
    if constexpr (requires { T::output_shape(); }) {
      if (direction == Direction::kInverse) {
        return T::output_shape();
      }
    }
    return T::shape();
  }

  torch::Tensor input(
      torch::ScalarType dtype,
      Direction direction = Direction::kForward) const {
    // Drawn in one dtype on one device: the same values for all.
    return torch::randn(shape(direction)).to(device_, dtype);
  }

  torch::Tensor empty_batch(Direction direction) const {
    std::vector<int64_t> sizes = shape(direction);
    sizes[0] = 0;
    return torch::ones(sizes, device_);
  }

  static Module twin_of(const Module& module) {
    return Module(std::dynamic_pointer_cast<typename Module::ContainedType>(
        module->clone()));
  }

  static auto wrap(const Module& module) {
    return memcnn::InvertibleModuleWrapper<Module>(
        module, memcnn::InvertibleModuleWrapperOptions());
  }

  template <class Holder>
  static torch::Tensor
  apply(Holder& module, Direction direction, const torch::Tensor& tensor) {
    return direction == Direction::kForward ? module->forward(tensor)
                                            : module->inverse(tensor);
  }

  template <class Holder>
  static memcnn::WithLogDet with_log_det(
      Holder& module,
      Direction direction,
      const torch::Tensor& tensor) {
    return direction == Direction::kForward
        ? module->forward_with_log_det(tensor)
        : module->inverse_with_log_det(tensor);
  }

  /// Of the whole Jacobian, row by row.
  static torch::Tensor
  log_det_of(Module& module, Direction direction, const torch::Tensor& at) {
    const torch::Tensor x = at.detach().clone().requires_grad_();
    const torch::Tensor y = apply(module, direction, x).flatten();
    std::vector<torch::Tensor> rows;
    for (int64_t i = 0; i < y.size(0); ++i) {
      rows.push_back(
          torch::autograd::grad({y[i]}, {x}, {}, /*retain_graph=*/true)[0]
              .flatten());
    }
    return std::get<1>(torch::linalg_slogdet(torch::stack(rows)));
  }

  /// The largest difference, beside 1 or the largest value.
  static double log_det_error(
      const torch::Tensor& found,
      const torch::Tensor& expected) {
    const double size =
        std::max(1., expected.detach().abs().max().template item<double>());
    return (found.detach().to(torch::kDouble) - expected.detach())
               .abs()
               .max()
               .template item<double>() /
        size;
  }

  static void expect_log_det(
      const torch::Tensor& found,
      const torch::Tensor& expected) {
    EXPECT_LT(log_det_error(found, expected), kLogDetFloat64)
        << found << " is not " << expected;
  }

  /// 1, 10, 19, ..
  torch::Tensor sample_weights() const {
    return 1 + 9 * torch::arange(T::shape()[0], device_);
  }

  torch::Tensor loss_of(
      const memcnn::WithLogDet& result,
      const Uses& uses = {true, true}) const {
    torch::Tensor loss = torch::zeros({}, result.output.options());
    if (uses.output) {
      const torch::Tensor& y = result.output;
      loss = loss +
          (y *
           torch::linspace(
               0.5, 1.5, y.numel(), y.options().requires_grad(false))
               .view(y.sizes()))
              .sum();
    }
    if (uses.log_det) {
      loss = loss + (sample_weights() * result.log_det).sum();
    }
    return loss;
  }

  template <class Holder>
  std::vector<torch::Tensor> log_det_gradients(
      Holder& module,
      Direction direction,
      const torch::Tensor& x,
      const Uses& uses) const {
    // Beside x by itself, as a log-determinant may be constant.
    const torch::Tensor loss =
        loss_of(with_log_det(module, direction, made_by_a_layer(x)), uses) +
        x.square().sum();
    std::vector<torch::Tensor> sources = module->parameters();
    sources.insert(sources.begin(), x);
    return torch::autograd::grad(
        {loss},
        sources,
        {},
        /*retain_graph=*/std::nullopt,
        /*create_graph=*/false,
        /*allow_unused=*/true);
  }

  /// Those of the squared gradients of a loss.
  static std::vector<torch::Tensor> second_derivatives(
      const torch::Tensor& loss,
      const torch::Tensor& x,
      const std::vector<torch::Tensor>& parameters) {
    torch::Tensor penalty = torch::zeros({}, loss.options());
    for (const torch::Tensor& gradient :
         gradients(loss, x, parameters, /*create_graph=*/true)) {
      penalty = penalty + gradient.square().sum();
    }
    return gradients(penalty, x, parameters);
  }

  static std::vector<torch::Tensor> gradients(
      const torch::Tensor& loss,
      const torch::Tensor& x,
      std::vector<torch::Tensor> sources,
      bool create_graph = false) {
    sources.insert(sources.begin(), x);
    return torch::autograd::grad(
        {loss}, sources, {}, /*retain_graph=*/std::nullopt, create_graph);
  }

  static std::string printed(const Module& module) {
    std::ostringstream stream;
    stream << module;
    return stream.str();
  }

  torch::Device device_;
};

} // namespace memcnn_test

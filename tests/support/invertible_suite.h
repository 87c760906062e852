// SPDX-License-Identifier: MIT
//
// What every invertible module has to do. A module passes by one line, given a
// struct that says how to make it:
//
//   struct AdditiveConv {
//     // A part of the tests' names.
//     static constexpr const char* kName = "Conv";
//     // A holder, in float32 and train mode.
//     static auto make();
//     // Of an input, batch first.
//     static std::vector<int64_t> shape();
//     // A part of what the module prints.
//     static std::string printed();
//     // The files of its values in tests/reference, without their dtypes.
//     static constexpr const char* kReference = "additive";
//   };
//   MEMCNN_INVERTIBLE_SUITE(AdditiveCoupling, AdditiveConv, AdditiveLinear);
//   MEMCNN_REFERENCE_SUITE(AdditiveCoupling, AdditiveConv);
//
// The second line, and kReference, are for modules with stored values of Python
// MemCNN. All of it runs again on a GPU, in suites that end in Cuda.
#pragma once

#include "invertible_checks.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <string>

namespace memcnn_test {

template <class T>
class Invertible : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }
  InvertibleChecks<T> checks{torch::Device(torch::kCPU)};
};

template <class T>
class InvertibleCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) {
      GTEST_SKIP() << "no CUDA device";
    }
    torch::manual_seed(1);
    // Rounds convolutions in float32 to 10 bits.
    at::globalContext().setAllowTF32CuDNN(false);
    at::globalContext().setDeterministicCuDNN(true);
  }
  InvertibleChecks<T> checks{torch::Device(torch::kCUDA, 0)};
};

template <class T>
class PythonReference : public Invertible<T> {};
template <class T>
class PythonReferenceCuda : public InvertibleCuda<T> {};

TYPED_TEST_SUITE_P(Invertible);
TYPED_TEST_SUITE_P(InvertibleCuda);
TYPED_TEST_SUITE_P(PythonReference);
TYPED_TEST_SUITE_P(PythonReferenceCuda);

// One list of tests, for both suites.
#define MEMCNN_INVERTIBLE_TESTS(Suite)                              \
  TYPED_TEST_P(Suite, InverseRecoversInputInFloat64) {              \
    this->checks.inverse_recovers_input(torch::kDouble);            \
  }                                                                 \
  TYPED_TEST_P(Suite, InverseRecoversInputInFloat32) {              \
    this->checks.inverse_recovers_input(torch::kFloat);             \
  }                                                                 \
  TYPED_TEST_P(Suite, InverseRecoversInputInFloat16) {              \
    this->checks.inverse_recovers_input(torch::kHalf);              \
  }                                                                 \
  TYPED_TEST_P(Suite, InverseRecoversInputInBFloat16) {             \
    this->checks.inverse_recovers_input(torch::kBFloat16);          \
  }                                                                 \
  TYPED_TEST_P(Suite, GradientsMatchPlainAutogradInFloat64) {       \
    this->checks.gradients_match_plain_autograd(torch::kDouble);    \
  }                                                                 \
  TYPED_TEST_P(Suite, GradientsMatchPlainAutogradInFloat32) {       \
    this->checks.gradients_match_plain_autograd(torch::kFloat);     \
  }                                                                 \
  TYPED_TEST_P(Suite, GradientsMatchPlainAutogradUnderAutocast) {   \
    this->checks.gradients_match_under_autocast();                  \
  }                                                                 \
  TYPED_TEST_P(Suite, GradcheckInFloat64) {                         \
    this->checks.gradcheck_in_float64();                            \
  }                                                                 \
  TYPED_TEST_P(Suite, SecondDerivativesMatchPlainAutograd) {        \
    this->checks.second_derivatives_match_plain_autograd();         \
  }                                                                 \
  TYPED_TEST_P(Suite, CloneIsDeep) {                                \
    this->checks.clone_is_deep();                                   \
  }                                                                 \
  TYPED_TEST_P(Suite, SurvivesSaveAndLoad) {                        \
    this->checks.survives_save_and_load();                          \
  }                                                                 \
  TYPED_TEST_P(Suite, PrintsItsOptions) {                           \
    this->checks.prints_its_options();                              \
  }                                                                 \
  TYPED_TEST_P(Suite, RejectsIntegerInput) {                        \
    this->checks.rejects_integer_input();                           \
  }                                                                 \
  TYPED_TEST_P(Suite, AcceptsEmptyBatch) {                          \
    this->checks.accepts_empty_batch();                             \
  }                                                                 \
  TYPED_TEST_P(Suite, ReleasesInputStorage) {                       \
    this->checks.releases_input_storage();                          \
  }                                                                 \
  TYPED_TEST_P(Suite, FitsIntoSequentialAndAnyModule) {             \
    this->checks.fits_into_sequential_and_any_module();             \
  }                                                                 \
  TYPED_TEST_P(Suite, MovesWithTo) {                                \
    this->checks.moves_with_to();                                   \
  }                                                                 \
  TYPED_TEST_P(Suite, LogDetMatchesJacobian) {                      \
    this->checks.log_det_matches_jacobian();                        \
  }                                                                 \
  TYPED_TEST_P(Suite, LogDetGradientsMatchPlainAutograd) {          \
    this->checks.log_det_gradients_match_plain_autograd();          \
  }                                                                 \
  TYPED_TEST_P(Suite, LogDetGradcheckInFloat64) {                   \
    this->checks.log_det_gradcheck_in_float64();                    \
  }                                                                 \
  TYPED_TEST_P(Suite, LogDetSecondDerivativesMatchPlainAutograd) {  \
    this->checks.log_det_second_derivatives_match_plain_autograd(); \
  }                                                                 \
  TYPED_TEST_P(Suite, LogDetIsThatOfPlainAutogradUnderAutocast) {   \
    this->checks.log_det_under_autocast();                          \
  }                                                                 \
  TYPED_TEST_P(Suite, LogDetInFloat32) {                            \
    this->checks.log_det_is_computed_in(torch::kFloat);             \
  }                                                                 \
  TYPED_TEST_P(Suite, LogDetInFloat16) {                            \
    this->checks.log_det_is_computed_in(torch::kHalf);              \
  }                                                                 \
  TYPED_TEST_P(Suite, LogDetInBFloat16) {                           \
    this->checks.log_det_is_computed_in(torch::kBFloat16);          \
  }                                                                 \
  REGISTER_TYPED_TEST_SUITE_P(                                      \
      Suite,                                                        \
      InverseRecoversInputInFloat64,                                \
      InverseRecoversInputInFloat32,                                \
      InverseRecoversInputInFloat16,                                \
      InverseRecoversInputInBFloat16,                               \
      GradientsMatchPlainAutogradInFloat64,                         \
      GradientsMatchPlainAutogradInFloat32,                         \
      GradientsMatchPlainAutogradUnderAutocast,                     \
      GradcheckInFloat64,                                           \
      SecondDerivativesMatchPlainAutograd,                          \
      CloneIsDeep,                                                  \
      SurvivesSaveAndLoad,                                          \
      PrintsItsOptions,                                             \
      RejectsIntegerInput,                                          \
      AcceptsEmptyBatch,                                            \
      ReleasesInputStorage,                                         \
      FitsIntoSequentialAndAnyModule,                               \
      MovesWithTo,                                                  \
      LogDetMatchesJacobian,                                        \
      LogDetGradientsMatchPlainAutograd,                            \
      LogDetGradcheckInFloat64,                                     \
      LogDetSecondDerivativesMatchPlainAutograd,                    \
      LogDetIsThatOfPlainAutogradUnderAutocast,                     \
      LogDetInFloat32,                                              \
      LogDetInFloat16,                                              \
      LogDetInBFloat16)

#define MEMCNN_REFERENCE_TESTS(Suite)                      \
  TYPED_TEST_P(Suite, MatchesPythonReferenceInFloat64) {   \
    this->checks.matches_python_reference(torch::kDouble); \
  }                                                        \
  TYPED_TEST_P(Suite, MatchesPythonReferenceInFloat32) {   \
    this->checks.matches_python_reference(torch::kFloat);  \
  }                                                        \
  REGISTER_TYPED_TEST_SUITE_P(                             \
      Suite, MatchesPythonReferenceInFloat64, MatchesPythonReferenceInFloat32)

MEMCNN_INVERTIBLE_TESTS(Invertible);
MEMCNN_INVERTIBLE_TESTS(InvertibleCuda);
MEMCNN_REFERENCE_TESTS(PythonReference);
MEMCNN_REFERENCE_TESTS(PythonReferenceCuda);

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(PythonReference);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(PythonReferenceCuda);

struct SuiteName {
  template <class T>
  static std::string GetName(int /*index*/) {
    return T::kName;
  }
};

// Use these in namespace memcnn_test.
#define MEMCNN_INVERTIBLE_SUITE(Prefix, ...)         \
  using Prefix##Kinds = testing::Types<__VA_ARGS__>; \
  INSTANTIATE_TYPED_TEST_SUITE_P(                    \
      Prefix, Invertible, Prefix##Kinds, SuiteName); \
  INSTANTIATE_TYPED_TEST_SUITE_P(                    \
      Prefix, InvertibleCuda, Prefix##Kinds, SuiteName)

#define MEMCNN_REFERENCE_SUITE(Prefix, ...)                    \
  using Prefix##References = testing::Types<__VA_ARGS__>;      \
  INSTANTIATE_TYPED_TEST_SUITE_P(                              \
      Prefix, PythonReference, Prefix##References, SuiteName); \
  INSTANTIATE_TYPED_TEST_SUITE_P(                              \
      Prefix, PythonReferenceCuda, Prefix##References, SuiteName)

} // namespace memcnn_test

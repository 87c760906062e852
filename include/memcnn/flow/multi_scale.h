// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/any_invertible.h>
#include <memcnn/detail/at_place.h>
#include <memcnn/detail/condition_choice.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/holder.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/sequence.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace memcnn {

/// What a flow of several scales makes of its input: the latents of each level,
/// the first level's first, and the log-determinant of all of them together,
/// (N), as in WithLogDet.
struct Latents {
  std::vector<at::Tensor> z;
  at::Tensor log_det;
};

/// The module behind MultiScale.
class MultiScaleImpl final : public torch::nn::Cloneable<MultiScaleImpl> {
 public:
  MultiScaleImpl() = default;

  template <class... Levels>
  explicit MultiScaleImpl(Levels... levels) {
    (push_back(std::move(levels)), ...);
  }

  /// The latents, one tensor a level.
  std::vector<at::Tensor> forward(const at::Tensor& input) {
    return run(input, {}, /*with_log_det=*/false).z;
  }

  /// Undoes forward(): from one latent a level, of the sizes that forward()
  /// gives them, to the input.
  at::Tensor inverse(const std::vector<at::Tensor>& z) {
    return run_back(z, {}, /*with_log_det=*/false).output;
  }

  Latents forward_with_log_det(const at::Tensor& input) {
    return run(input, {}, /*with_log_det=*/true);
  }

  /// The log_det is that of the inverse.
  WithLogDet inverse_with_log_det(const std::vector<at::Tensor>& z) {
    return run_back(z, {}, /*with_log_det=*/true);
  }

  /// The same four methods under conditions.
  class Given {
   public:
    std::vector<at::Tensor> forward(const at::Tensor& input) const {
      return flow_->run(input, conditions_, /*with_log_det=*/false).z;
    }
    at::Tensor inverse(const std::vector<at::Tensor>& z) const {
      return flow_->run_back(z, conditions_, /*with_log_det=*/false).output;
    }
    Latents forward_with_log_det(const at::Tensor& input) const {
      return flow_->run(input, conditions_, /*with_log_det=*/true);
    }
    WithLogDet inverse_with_log_det(const std::vector<at::Tensor>& z) const {
      return flow_->run_back(z, conditions_, /*with_log_det=*/true);
    }

   private:
    friend class MultiScaleImpl;
    Given(MultiScaleImpl& flow, std::vector<at::Tensor> conditions)
        : owner_(flow.weak_from_this().lock()),
          flow_(&flow),
          conditions_(std::move(conditions)) {}

    std::shared_ptr<torch::nn::Module> owner_; // null of one on the stack
    MultiScaleImpl* flow_;
    std::vector<at::Tensor> conditions_;
  };

  /// Each level gets as many of the conditions as its blocks take, or those that
  /// push_back() says.
  Given given(std::vector<at::Tensor> conditions) {
    return {*this, std::move(conditions)};
  }

  /// Adds a level: a ReversibleSequence, or any other block of one, which gets a
  /// sequence of its own.
  void push_back(AnyInvertible level) {
    add_level(
        as_sequence(std::move(level)), detail::ConditionChoice(std::nullopt));
  }

  /// Likewise, and says which of the conditions that given() binds the level
  /// gets, counted from 0.
  void push_back(AnyInvertible level, std::vector<size_t> conditions) {
    add_level(
        as_sequence(std::move(level)),
        detail::ConditionChoice(std::move(conditions)));
  }

  size_t size() const noexcept {
    return levels_.size();
  }

  /// The i-th level. Throws c10::IndexError if there is none.
  ReversibleSequence level(size_t index) const {
    TORCH_CHECK_INDEX(
        index < size(),
        "MultiScale::level(): expected an index below the number of levels, ",
        size(),
        ", but got ",
        index,
        ". Count from 0.");
    return levels_[index].sequence;
  }

  /// The levels are registered by push_back().
  void reset() override {}

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<c10::Device>& device = std::nullopt) const override {
    auto copy = std::make_shared<MultiScaleImpl>();
    for (const Level& level : levels_) {
      const size_t first = first_use(level.sequence);
      copy->add_level(
          first < copy->size() ? copy->levels_[first].sequence
                               : detail::clone(level.sequence, device),
          level.choice);
    }
    detail::copy_modes(*this, *copy);
    return copy;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::MultiScale";
  }

 private:
  struct Level {
    ReversibleSequence sequence;
    detail::ConditionChoice choice;
  };

  /// A level used twice is one child: registered twice, its parameters would be
  /// stepped twice.
  void add_level(ReversibleSequence sequence, detail::ConditionChoice choice) {
    if (first_use(sequence) == size()) {
      register_module(std::to_string(size()), sequence);
    }
    levels_.push_back({std::move(sequence), std::move(choice)});
  }

  /// The first level that is this sequence; the number of levels if none is.
  size_t first_use(const ReversibleSequence& sequence) const {
    size_t first = 0;
    while (first < size() && levels_[first].sequence.ptr() != sequence.ptr()) {
      ++first;
    }
    return first;
  }

  static ReversibleSequence as_sequence(AnyInvertible level) {
    if (auto sequence =
            std::dynamic_pointer_cast<ReversibleSequenceImpl>(level.ptr())) {
      return ReversibleSequence(std::move(sequence));
    }
    ReversibleSequence sequence;
    sequence->push_back(std::move(level));
    return sequence;
  }

  Latents run(
      const at::Tensor& input,
      const std::vector<at::Tensor>& conditions,
      bool with_log_det) {
    check(Direction::kForward, conditions);
    Latents latents;
    at::Tensor stream = input;
    for (size_t i = 0; i < size(); ++i) {
      WithLogDet result =
          map(Direction::kForward, i, stream, conditions, with_log_det);
      add(latents.log_det, result.log_det);
      if (i + 1 == size()) {
        latents.z.push_back(std::move(result.output));
      } else {
        std::tie(stream, result.output) = factored_out(i, result.output);
        latents.z.push_back(std::move(result.output));
      }
    }
    return latents;
  }

  WithLogDet run_back(
      const std::vector<at::Tensor>& z,
      const std::vector<at::Tensor>& conditions,
      bool with_log_det) {
    check(Direction::kInverse, conditions);
    TORCH_CHECK_VALUE(
        z.size() == size(),
        "MultiScale::inverse(): expected ",
        size(),
        " latents, one a level, but got ",
        z.size(),
        ". Pass as many as forward() returns.");
    WithLogDet result{z.back(), at::Tensor()};
    for (size_t i = size(); i-- > 0;) {
      if (i + 1 < size()) {
        check_latent(z, i, result.output);
        result.output = at::cat({result.output, z[i]}, /*dim=*/1);
      }
      WithLogDet before =
          map(Direction::kInverse, i, result.output, conditions, with_log_det);
      result.output = std::move(before.output);
      add(result.log_det, before.log_det);
    }
    return result;
  }

  static void add(at::Tensor& sum, const at::Tensor& log_det) {
    if (log_det.defined()) {
      sum = sum.defined() ? sum + log_det : log_det;
    }
  }

  /// One level, or its inverse.
  WithLogDet map(
      Direction direction,
      size_t i,
      const at::Tensor& input,
      const std::vector<at::Tensor>& conditions,
      bool with_log_det) {
    const auto here = [&] {
      return c10::str("MultiScale::", name_of(direction), "(): level ", i);
    };
    return detail::at_place(here, [&]() -> WithLogDet {
      ReversibleSequence& sequence = levels_[i].sequence;
      const memcnn::Given level =
          sequence->given(levels_[i].choice.of(*sequence, conditions));
      const bool is_forward = direction == Direction::kForward;
      if (with_log_det) {
        return is_forward ? level.forward_with_log_det(input)
                          : level.inverse_with_log_det(input);
      }
      return {
          is_forward ? level.forward(input) : level.inverse(input),
          at::Tensor()};
    });
  }

  /// The half that goes on to the next level, and the half that is a latent.
  static std::pair<at::Tensor, at::Tensor> factored_out(
      size_t i,
      const at::Tensor& output) {
    TORCH_CHECK_VALUE(
        output.dim() > 1 && output.size(1) > 1,
        "MultiScale::forward(): expected at least 2 channels after level ",
        i,
        ", of which the next level gets one half, but got ",
        detail::describe(output),
        ". Give the level more channels, as Squeeze does.");
    std::vector<at::Tensor> halves = at::chunk(output, 2, /*dim=*/1);
    return {std::move(halves[0]), std::move(halves[1])};
  }

  /// Stops where latent i is not the other half of what the next level returned.
  static void check_latent(
      const std::vector<at::Tensor>& z,
      size_t i,
      const at::Tensor& half) {
    const at::Tensor& latent = z[i];
    std::vector<int64_t> sizes = half.sizes().vec();
    const bool fits = latent.defined() && latent.dim() == half.dim() &&
        (half.size(1) == latent.size(1) || half.size(1) == latent.size(1) + 1);
    if (fits) {
      sizes[1] = latent.size(1);
    }
    // Of the last two either may be the wrong one.
    const bool names_both = latent.defined() && i + 2 == z.size();
    TORCH_CHECK_VALUE(
        fits && latent.sizes() == at::IntArrayRef(sizes),
        "MultiScale::inverse(): expected a latent ",
        i,
        " of sizes ",
        at::IntArrayRef(sizes),
        ", as the other half that level ",
        i + 1,
        " returned",
        names_both ? or_another_last(z, half) : "",
        ", but got ",
        detail::describe(latent),
        names_both ? " and " + detail::describe(z.back()) : "",
        ". Draw latents of the sizes that forward() returns.");
  }

  /// Says which last latent would fit the one before it. A level scales each
  /// dimension, so that the one at hand, of which `half` was made, tells.
  static std::string or_another_last(
      const std::vector<at::Tensor>& z,
      const at::Tensor& half) {
    const at::Tensor& latent = z[z.size() - 2];
    std::vector<int64_t> sizes = z.back().sizes().vec();
    bool known = latent.dim() == half.dim() && z.back().dim() == half.dim();
    for (int64_t dim = 0; known && dim < half.dim(); ++dim) {
      const bool is_half_of_odd =
          dim == 1 && half.size(dim) == latent.size(dim) + 1;
      if (!is_half_of_odd) {
        int64_t& size = sizes[static_cast<size_t>(dim)];
        size *= latent.size(dim);
        known = half.size(dim) > 0 && size % half.size(dim) == 0;
        size = known ? size / half.size(dim) : size;
      }
    }
    return known ? c10::str(
                       ", or a latent ",
                       z.size() - 1,
                       " of sizes ",
                       at::IntArrayRef(sizes),
                       " beside this one")
                 : c10::str(", or another latent ", z.size() - 1);
  }

  void check(Direction direction, const std::vector<at::Tensor>& given) const {
    TORCH_CHECK(
        size() > 0,
        "MultiScale::",
        name_of(direction),
        "(): expected at least one level, but got none. Add levels with "
        "push_back().");
    size_t expected = 0;
    for (const Level& level : levels_) {
      expected = (std::max)(expected, level.choice.needed(*level.sequence));
    }
    TORCH_CHECK_VALUE(
        given.size() == expected,
        "MultiScale::",
        name_of(direction),
        "(): expected ",
        expected,
        " conditions for all levels, but got ",
        given.size(),
        ". Pass to given({...}) what the blocks take, and say which level gets "
        "it by push_back(level, {...}).");
  }

  std::vector<Level> levels_;
};

/// A flow of several scales: after each level but the last one half of the
/// channels is a latent, and the other half goes on to the next level, which
/// often begins with a Squeeze.
///
/// \f[ (h_1, z_1) = f_1(x), \; (h_2, z_2) = f_2(h_1), \; \dots, \;
///     z_L = f_L(h_{L-1}) \f]
///
/// Shapes:   input (N, C, *); latent l is the second half, floor(C_l / 2), of
///           the C_l channels that level l returns, the last one all of them.
/// Dtypes:   those of the levels.
/// Log-det:  the sum of those of the levels.
/// Memory:   each level is a ReversibleSequence and keeps its output: 1 + 1/2 +
///           1/4 + ... < 2 inputs until backward, whatever the depths of levels.
/// Accuracy: what a level rebuilds starts from its own output: errors do not
///           grow from level to level.
/// Throws:   c10::ValueError for latents of other sizes, a wrong number of
///           conditions, or fewer than 2 channels after a level.
/// Source:   Dinh et al. 2017, Density estimation using Real NVP,
///           arXiv:1605.08803, section 3.6.
/// Example:
///   memcnn::MultiScale flow(level(12), level(24), level(48));
///   auto [z, log_det] = flow->forward_with_log_det(x);
///   torch::Tensor x_again = flow->inverse(z);
class MultiScale : public torch::nn::ModuleHolder<MultiScaleImpl> {
 public:
  using torch::nn::ModuleHolder<MultiScaleImpl>::ModuleHolder;
  using Impl = MultiScaleImpl;
};

} // namespace memcnn

// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/holder.h>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <torch/nn/modules/container/sequential.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <type_traits>
#include <utility>

namespace memcnn::detail {

// How a branch of a coupling is called: with one half, and then with conditions,
// all of them Tensors. How many it takes shows in its type, but for a Sequential
// and an AnyModule, which may take any number.

/// The most conditions that a branch can take.
inline constexpr size_t kMaxConditions = 8;

template <size_t>
using TensorAt = const at::Tensor&;

/// What forward of a held module returns for one tensor and as many conditions
/// as the sequence is long; void where it does not take them.
template <class Holder, class Conditions, class = void>
struct branch_result {
  using type = void;
};
template <class Holder, size_t... I>
struct branch_result<
    Holder,
    std::index_sequence<I...>,
    std::void_t<decltype(std::declval<contained_t<Holder>&>().forward(
        std::declval<const at::Tensor&>(),
        std::declval<TensorAt<I>>()...))>> {
  using type = decltype(std::declval<contained_t<Holder>&>().forward(
      std::declval<const at::Tensor&>(),
      std::declval<TensorAt<I>>()...));
};

template <class Holder>
inline constexpr bool takes_any_number_v =
    is_any_module_v<Holder> || std::is_same_v<Holder, torch::nn::Sequential>;

/// Whether a branch can be called with this many conditions.
template <class Holder, size_t count>
inline constexpr bool takes_conditions_v =
    takes_any_number_v<Holder> ||
    !std::is_void_v<
        typename branch_result<Holder, std::make_index_sequence<count>>::type>;

/// The fewest conditions, and the most, that a branch takes; 0 and 0 where it
/// cannot be called at all.
struct ConditionRange {
  size_t least = 0;
  size_t most = 0;
};

template <class Holder, size_t... counts>
constexpr ConditionRange conditions_of(std::index_sequence<counts...>) {
  ConditionRange range{kMaxConditions + 1, 0};
  const auto add = [&](size_t count, bool takes) {
    if (takes) {
      range.least = (std::min)(range.least, count);
      range.most = count;
    }
  };
  (add(counts, takes_conditions_v<Holder, counts>), ...);
  return range.least > range.most ? ConditionRange() : range;
}

template <class Holder>
inline constexpr ConditionRange conditions_of_v =
    conditions_of<Holder>(std::make_index_sequence<kMaxConditions + 1>());

/// Whether a held module maps a Tensor, and perhaps conditions, to a Value; true
/// where that shows only when it runs.
template <class Holder, class Value>
constexpr bool may_return() {
  if constexpr (!is_holder_v<Holder> || takes_any_number_v<Holder>) {
    return true;
  } else {
    return std::is_convertible_v<
        typename branch_result<
            Holder,
            std::make_index_sequence<conditions_of_v<Holder>.least>>::type,
        Value>;
  }
}

template <class Value, class Holder, size_t... I>
Value call_with(
    Holder& holder,
    at::TensorList arguments,
    std::index_sequence<I...>) {
  if constexpr (is_any_module_v<Holder>) {
    return holder.template forward<Value>(arguments[I]...);
  } else if constexpr (std::is_same_v<Holder, torch::nn::Sequential>) {
    return holder->template forward<Value>(arguments[I]...);
  } else {
    return holder->forward(arguments[I]...);
  }
}

template <class Value, size_t count, class Holder>
Value call_with_at_most(Holder& holder, at::TensorList arguments) {
  if constexpr (takes_conditions_v<Holder, count>) {
    if (arguments.size() == count + 1) {
      return call_with<Value>(
          holder, arguments, std::make_index_sequence<count + 1>());
    }
  }
  if constexpr (count > 0) {
    return call_with_at_most<Value, count - 1>(holder, arguments);
  } else {
    TORCH_CHECK_VALUE(
        false,
        "expected ",
        conditions_of_v<Holder>.least,
        " conditions or more, but got ",
        arguments.size() - 1,
        ". Pass as many to given({...}) as the branch takes beside the half.");
  }
}

/// Calls a held module whose forward maps a tensor, and then conditions, to a
/// Value: with as many of the arguments, the first ones, as it takes.
template <class Value, class Holder>
Value call_branch(Holder& holder, at::TensorList arguments) {
  constexpr size_t kMost = conditions_of_v<Holder>.most;
  return call_with_at_most<Value, kMost>(
      holder, arguments.slice(0, (std::min)(arguments.size(), kMost + 1)));
}

/// How many conditions a branch takes in a call that does not say: the fewest.
template <class Holder>
using UsualConditions = std::make_index_sequence<conditions_of_v<Holder>.least>;

/// How many conditions a block of these branches takes; none where any number
/// may do.
template <class... Branches>
constexpr std::optional<size_t> condition_count_of() {
  if constexpr (((conditions_of_v<Branches>.least ==
                  conditions_of_v<Branches>.most) &&
                 ...)) {
    return (std::max)({conditions_of_v<Branches>.least...});
  } else {
    return std::nullopt;
  }
}

} // namespace memcnn::detail

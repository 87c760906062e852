// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// The signature of a member function as a plain function type; const is
/// dropped.
template <class Member>
struct signature_of {
  using type = void;
};
template <class R, class C, class... Args>
struct signature_of<R (C::*)(Args...)> {
  using type = R(Args...);
};
template <class R, class C, class... Args>
struct signature_of<R (C::*)(Args...) const> : signature_of<R (C::*)(Args...)> {
};
template <class R, class C, class... Args>
struct signature_of<R (C::*)(Args...) noexcept>
    : signature_of<R (C::*)(Args...)> {};
template <class R, class C, class... Args>
struct signature_of<R (C::*)(Args...) const noexcept>
    : signature_of<R (C::*)(Args...)> {};

/// The signature of M::forward and M::inverse, or void where M has no such
/// single, non-template member.
template <class M, class = void>
struct forward_signature {
  using type = void;
};
template <class M>
struct forward_signature<M, std::void_t<decltype(&M::forward)>>
    : signature_of<decltype(&M::forward)> {};

template <class M, class = void>
struct inverse_signature {
  using type = void;
};
template <class M>
struct inverse_signature<M, std::void_t<decltype(&M::inverse)>>
    : signature_of<decltype(&M::inverse)> {};

template <class M>
inline constexpr bool has_forward_v =
    !std::is_void_v<typename forward_signature<M>::type>;
template <class M>
inline constexpr bool has_inverse_v =
    !std::is_void_v<typename inverse_signature<M>::type>;

/// Whether a module has forward_with_log_det and inverse_with_log_det, which take
/// what its forward and inverse take.
template <class M, class Forward, class Inverse, class = void>
inline constexpr bool takes_log_det_v = false;
template <class M, class R, class... Args, class S, class... Brgs>
inline constexpr bool takes_log_det_v<
    M,
    R(Args...),
    S(Brgs...),
    std::void_t<
        decltype(std::declval<M&>().forward_with_log_det(
            std::declval<std::decay_t<Args>&>()...)),
        decltype(std::declval<M&>().inverse_with_log_det(
            std::declval<std::decay_t<Brgs>&>()...))>> = true;
template <class M>
inline constexpr bool has_log_det_v = takes_log_det_v<
    M,
    typename forward_signature<M>::type,
    typename inverse_signature<M>::type>;

/// Whether a signature maps one Tensor to one Tensor.
template <class Signature>
inline constexpr bool maps_tensor_v = false;
template <class R, class Arg>
inline constexpr bool maps_tensor_v<R(Arg)> =
    std::is_same_v<std::decay_t<R>, at::Tensor>&&
        std::is_same_v<std::decay_t<Arg>, at::Tensor>;

/// Whether two signatures map one Tensor to one Tensor, given as many others,
/// the same number in both.
template <class Forward, class Inverse>
inline constexpr bool maps_tensor_given_v = false;
template <class R, class... Args, class S, class... Brgs>
inline constexpr bool maps_tensor_given_v<R(Args...), S(Brgs...)> = sizeof...(
                                                                        Args) ==
        sizeof...(Brgs) &&
    sizeof...(Args) > 0 &&
    std::is_same_v<std::decay_t<R>,
                   at::Tensor>&& std::is_same_v<std::decay_t<S>, at::Tensor> &&
    (std::is_same_v<std::decay_t<Args>, at::Tensor> && ...) &&
    (std::is_same_v<std::decay_t<Brgs>, at::Tensor> && ...);

// Packs: how a function's arguments or result become a flat list of tensors,
// and back. A pack is Tensors, one tuple of Tensors, or one vector of Tensors.

template <class T>
struct is_tensor_tuple : std::false_type {};
template <class... Ts>
struct is_tensor_tuple<std::tuple<Ts...>>
    : std::bool_constant<(std::is_same_v<Ts, at::Tensor> && ...)> {};

template <class T>
inline constexpr bool is_tensor_vector_v =
    std::is_same_v<T, std::vector<at::Tensor>>;

/// Whether a type can be a whole pack by itself.
template <class T>
inline constexpr bool is_pack_v = std::is_same_v<T, at::Tensor> ||
    is_tensor_tuple<T>::value || is_tensor_vector_v<T>;

/// Whether arguments of these types form a pack.
template <class... Args>
inline constexpr bool are_pack_v =
    (sizeof...(Args) > 0 &&
     (std::is_same_v<std::decay_t<Args>, at::Tensor> && ...)) ||
    (sizeof...(Args) == 1 && (is_pack_v<std::decay_t<Args>> && ...));

/// Whether a signature maps one pack to another.
template <class Signature>
inline constexpr bool maps_pack_v = false;
template <class R, class... Args>
inline constexpr bool maps_pack_v<R(Args...)> =
    are_pack_v<Args...>&& is_pack_v<std::decay_t<R>>;

inline void append_to(std::vector<at::Tensor>& flat, const at::Tensor& tensor) {
  flat.push_back(tensor);
}
inline void append_to(
    std::vector<at::Tensor>& flat,
    const std::vector<at::Tensor>& tensors) {
  flat.insert(flat.end(), tensors.begin(), tensors.end());
}
template <class... Ts>
void append_to(
    std::vector<at::Tensor>& flat,
    const std::tuple<Ts...>& tensors) {
  std::apply(
      [&](const auto&... each) { (flat.push_back(each), ...); }, tensors);
}

template <class... Args>
std::vector<at::Tensor> pack(const Args&... args) {
  std::vector<at::Tensor> flat;
  (append_to(flat, args), ...);
  return flat;
}

template <class T, size_t... I>
T tuple_from(const std::vector<at::Tensor>& flat, std::index_sequence<I...>) {
  return T(flat[I]...);
}

/// How many tensors a pack of type T holds; -1 where any number will do.
template <class T>
constexpr std::ptrdiff_t pack_size() {
  if constexpr (is_tensor_vector_v<T>) {
    return -1;
  } else if constexpr (is_tensor_tuple<T>::value) {
    return std::tuple_size_v<T>;
  } else {
    return 1;
  }
}

/// How many of the tensors that forward and inverse of a module take are
/// conditions: those, the last ones, that the other does not return.
template <class Forward, class Inverse>
inline constexpr std::ptrdiff_t conditions_in_v = 0;
template <class R, class... Args, class S, class... Brgs>
inline constexpr std::ptrdiff_t conditions_in_v<R(Args...), S(Brgs...)> = [] {
  constexpr std::ptrdiff_t kForward =
      (pack_size<std::decay_t<Args>>() + ... + 0);
  constexpr std::ptrdiff_t kInverse =
      (pack_size<std::decay_t<Brgs>>() + ... + 0);
  constexpr std::ptrdiff_t kOutputs = pack_size<std::decay_t<R>>();
  constexpr std::ptrdiff_t kInputs = pack_size<std::decay_t<S>>();
  constexpr bool kAnyNumber =
      ((pack_size<std::decay_t<Args>>() < 0) || ... || false) ||
      ((pack_size<std::decay_t<Brgs>>() < 0) || ... || false) || kOutputs < 0 ||
      kInputs < 0;
  return !kAnyNumber && kForward > kInputs &&
          kForward - kInputs == kInverse - kOutputs
      ? kForward - kInputs
      : 0;
}();

/// The pack of type T that these tensors make; the caller has checked their
/// number.
template <class T>
T unpack(const std::vector<at::Tensor>& flat) {
  if constexpr (std::is_same_v<T, at::Tensor>) {
    return flat[0];
  } else if constexpr (is_tensor_vector_v<T>) {
    return flat;
  } else {
    return tuple_from<T>(
        flat, std::make_index_sequence<std::tuple_size_v<T>>());
  }
}

/// Calls fn with a flat list spread over arguments of the given types.
template <class Signature>
struct Spread;
template <class R, class... Args>
struct Spread<R(Args...)> {
  template <class Fn>
  static R call(Fn&& fn, const std::vector<at::Tensor>& flat) {
    if constexpr (sizeof...(Args) == 1) {
      return fn(unpack<std::decay_t<Args>>(flat)...);
    } else {
      return each(fn, flat, std::index_sequence_for<Args...>());
    }
  }

  /// How many tensors the arguments hold; -1 where any number will do.
  static constexpr std::ptrdiff_t count() {
    if constexpr ((is_tensor_vector_v<std::decay_t<Args>> || ...)) {
      return -1;
    } else {
      return (pack_size<std::decay_t<Args>>() + ... + 0);
    }
  }

 private:
  template <class Fn, size_t... I>
  static R
  each(Fn& fn, const std::vector<at::Tensor>& flat, std::index_sequence<I...>) {
    return fn(flat[I]...);
  }
};

} // namespace memcnn::detail

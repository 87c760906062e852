// SPDX-License-Identifier: MIT
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <string>

namespace training {

namespace detail {

/// One of Python's classes torch.FloatStorage and so on, and its dtype there.
struct StorageClass {
  at::ScalarType dtype;
  const char* name;
  const char* dtype_name;
};

inline constexpr StorageClass kStorageClasses[] = {
    {at::kFloat, "FloatStorage", "float32"},
    {at::kDouble, "DoubleStorage", "float64"},
    {at::kHalf, "HalfStorage", "float16"},
    {at::kBFloat16, "BFloat16Storage", "bfloat16"},
    {at::kLong, "LongStorage", "int64"},
    {at::kInt, "IntStorage", "int32"},
    {at::kShort, "ShortStorage", "int16"},
    {at::kChar, "CharStorage", "int8"},
    {at::kByte, "ByteStorage", "uint8"},
    {at::kBool, "BoolStorage", "bool"},
};

/// Null if Python's `global`, such as "torch.FloatStorage", is none.
inline const StorageClass* find_storage_class(const std::string& global) {
  const auto* const found = std::find_if(
      std::begin(kStorageClasses),
      std::end(kStorageClasses),
      [&](const StorageClass& one) {
        return global == std::string("torch.") + one.name;
      });
  return found == std::end(kStorageClasses) ? nullptr : found;
}

inline const char* storage_name(at::ScalarType dtype) {
  for (const auto& one : kStorageClasses) {
    if (one.dtype == dtype) {
      return one.name;
    }
  }
  TORCH_CHECK_TYPE(
      false,
      "write_state_dict(): expected a dtype that torch.save() had a storage "
      "class for, but got ",
      dtype,
      ".");
}

/// As Python prints it, where torch.save() has a storage class for it.
inline std::string name_of(at::ScalarType dtype) {
  for (const auto& one : kStorageClasses) {
    if (one.dtype == dtype) {
      return one.dtype_name;
    }
  }
  return c10::toString(dtype);
}

} // namespace detail

} // namespace training

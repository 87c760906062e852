// SPDX-License-Identifier: MIT
#pragma once

// Reads Python's pickle format, as far as tensors in dicts need it. A pickle is
// a program for a stack machine that may import and call anything: here it gets
// what class Objects hands out, and nothing else. saved_tensors.h says what.

#include "support/printable.h"
#include "train/base/format_error.h"
#include "train/weights/byte_reader.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace training::pickle {

struct Value;

/// None, a bool, a float, or other plain data: nothing here asks which.
struct Other {};
struct Tuple {
  std::vector<const Value*> items;
};
/// A list or a set, without what it holds: no tensor of a state dict is in one.
struct List {};
struct Dict {
  std::vector<std::pair<const Value*, const Value*>> items;
};
/// Something of a Python module, as "module.name".
struct Global {
  std::string name;
};

using Data = std::
    variant<Other, int64_t, std::string, Tuple, List, Dict, Global, at::Tensor>;

/// What a pickle can put on its stack. Points to its parts, which the Unpickler
/// owns: it may be part of itself, and nest as deep as it likes. A c10::IValue
/// owns its parts: the one would leak, and the other overflow the stack.
struct Value {
  Data data;

  /// Null if it is something else.
  template <class T>
  const T* as() const {
    return std::get_if<T>(&data);
  }
};

/// What a pickle may name, and what comes of it.
class Objects {
 public:
  virtual ~Objects() = default;
  /// Whether the pickle may name it at all.
  virtual bool knows(const std::string& global) const = 0;
  /// The result of calling it.
  virtual Data call(const std::string& global, const Tuple& arguments) = 0;
  /// What the pickle refers to, but which is stored beside it.
  virtual Data stored(const Tuple& id) = 0;
};

/// Runs the program that a pickle is, protocol 2 to 5.
///
/// Throws:   FormatError if it ends early, names what Objects does not know, or
///           needs more than plain data does.
class Unpickler final {
 public:
  Unpickler(std::string_view bytes, Objects& objects)
      : bytes_(bytes, "its pickle"), objects_(objects) {}

  /// The result, owned by this.
  const Value& run() {
    constexpr unsigned kStop = '.';
    for (unsigned opcode = byte(); opcode != kStop; opcode = byte()) {
      step(opcode);
    }
    return *pop();
  }

 private:
  void step(unsigned opcode) {
    switch (opcode) {
      case 0x80: // PROTO
        bytes_.take(1);
        break;
      case 0x95: // FRAME
        bytes_.take(8);
        break;
      case '(': // MARK
        marks_.push_back(stack_.size());
        break;
      case 'N': // NONE
      case 0x88: // NEWTRUE
      case 0x89: // NEWFALSE
        push(Other{});
        break;
      case 'G': // BINFLOAT
        bytes_.take(8);
        push(Other{});
        break;
      case 'K': // BININT1
        push(integer(1));
        break;
      case 'M': // BININT2
        push(integer(2));
        break;
      case 'J': // BININT
        push(signed_integer(4));
        break;
      case 0x8a: // LONG1
        push_long(bytes_.integer(1));
        break;
      case 0x8b: // LONG4
        push_long(bytes_.integer(4));
        break;
      case 0x8c: // SHORT_BINUNICODE
        push(text(integer(1)));
        break;
      case 'X': // BINUNICODE
        push(text(integer(4)));
        break;
      case 'C': // SHORT_BINBYTES
        pass_over(bytes_.integer(1));
        break;
      case 'B': // BINBYTES
        pass_over(bytes_.integer(4));
        break;
      case 0x8e: // BINBYTES8
      case 0x96: // BYTEARRAY8
        pass_over(bytes_.integer(8));
        break;
      case 0x91: // FROZENSET
        pop_to_mark();
        push(Other{});
        break;
      case ')': // EMPTY_TUPLE
        push(Tuple{});
        break;
      case 0x85: // TUPLE1
      case 0x86: // TUPLE2
      case 0x87: // TUPLE3
        push(Tuple{pop_many(opcode - 0x84)});
        break;
      case 't': // TUPLE
        push(Tuple{pop_to_mark()});
        break;
      case 0x8f: // EMPTY_SET
      case ']': // EMPTY_LIST
        push(List{});
        break;
      case 'a': // APPEND
        pop();
        expect<List>(top());
        break;
      case 0x90: // ADDITEMS
      case 'e': // APPENDS
        pop_to_mark();
        expect<List>(top());
        break;
      case '}': // EMPTY_DICT
        push(Dict{});
        break;
      case 's': // SETITEM
        set_items(pop_many(2));
        break;
      case 'u': // SETITEMS
        set_items(pop_to_mark());
        break;
      case 'q': // BINPUT
        remember(integer(1));
        break;
      case 'r': // LONG_BINPUT
        remember(integer(4));
        break;
      case 0x94: // MEMOIZE
        remember(static_cast<int64_t>(memo_.size()));
        break;
      case 'h': // BINGET
        recall(integer(1));
        break;
      case 'j': // LONG_BINGET
        recall(integer(4));
        break;
      case 'c': { // GLOBAL
        const std::string module(bytes_.line());
        push_global(module, std::string(bytes_.line()));
        break;
      }
      case 0x93: { // STACK_GLOBAL
        const std::string name = expect<std::string>(pop());
        push_global(expect<std::string>(pop()), name);
        break;
      }
      case 'R': { // REDUCE
        const Tuple& arguments = expect<Tuple>(pop());
        push(objects_.call(expect<Global>(pop()).name, arguments));
        break;
      }
      case 'b': // BUILD: attributes, such as the _metadata of a state dict
        pop();
        expect<Dict>(top());
        break;
      case 'Q': // BINPERSID
        push(objects_.stored(expect<Tuple>(pop())));
        break;
      default:
        throw FormatError(fmt::format(
            "its pickle has the opcode {}, which a dict of tensors does not "
            "need",
            opcode));
    }
  }

  unsigned byte() {
    return static_cast<unsigned>(bytes_.integer(1));
  }

  int64_t integer(unsigned count) {
    return static_cast<int64_t>(bytes_.integer(count));
  }

  /// Of any length: what takes more than 64 bits is nothing of a tensor.
  void push_long(uint64_t count) {
    if (count > 8) {
      pass_over(count);
    } else {
      push(signed_integer(static_cast<unsigned>(count)));
    }
  }

  void pass_over(uint64_t count) {
    bytes_.take(count);
    push(Other{});
  }

  /// In two's complement, of up to eight bytes.
  int64_t signed_integer(unsigned count) {
    const int64_t value = integer(count);
    const bool negative =
        count > 0 && count < 8 && value >> (8 * count - 1) == 1;
    return negative ? value - (int64_t{1} << 8 * count) : value;
  }

  std::string text(int64_t size) {
    return std::string(bytes_.take(static_cast<uint64_t>(size)));
  }

  void push(Data data) {
    values_.push_back({std::move(data)});
    stack_.push_back(&values_.back());
  }

  Value* top() {
    const size_t bottom = marks_.empty() ? 0 : marks_.back();
    if (stack_.size() <= bottom) {
      bytes_.stop_on_corruption();
    }
    return stack_.back();
  }

  Value* pop() {
    Value* const value = top();
    stack_.pop_back();
    return value;
  }

  std::vector<const Value*> pop_many(size_t count) {
    std::vector<const Value*> items(count);
    for (size_t index = count; index > 0; --index) {
      items[index - 1] = pop();
    }
    return items;
  }

  std::vector<const Value*> pop_to_mark() {
    if (marks_.empty()) {
      bytes_.stop_on_corruption();
    }
    auto items = pop_many(stack_.size() - marks_.back());
    marks_.pop_back();
    return items;
  }

  template <class T>
  T& expect(Value* value) const {
    T* const found = std::get_if<T>(&value->data);
    if (found == nullptr) {
      bytes_.stop_on_corruption();
    }
    return *found;
  }

  void set_items(const std::vector<const Value*>& items) {
    auto& dict = expect<Dict>(top()).items;
    if (items.size() % 2 != 0) {
      bytes_.stop_on_corruption();
    }
    for (size_t index = 0; index < items.size(); index += 2) {
      dict.emplace_back(items[index], items[index + 1]);
    }
  }

  void remember(int64_t key) {
    memo_[key] = top();
  }

  void recall(int64_t key) {
    const auto found = memo_.find(key);
    if (found == memo_.end()) {
      bytes_.stop_on_corruption();
    }
    stack_.push_back(found->second);
  }

  void push_global(const std::string& module, const std::string& name) {
    const std::string global = module + "." + name;
    if (!objects_.knows(global)) {
      throw FormatError(fmt::format(
          "its pickle needs Python's {}, which is not run",
          support::printable(global)));
    }
    push(Global{global});
  }

  ByteReader bytes_;
  Objects& objects_;
  std::deque<Value> values_; // does not move what it holds
  std::vector<Value*> stack_;
  std::vector<size_t> marks_; // heights of the stack
  std::unordered_map<int64_t, Value*> memo_;
};

} // namespace training::pickle

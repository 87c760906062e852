// SPDX-License-Identifier: MIT
#pragma once

// Reads and writes Python's pickle format, as far as tensors in dicts need it.
// A pickle is a program for a stack machine that may import and call anything:
// here it gets what class Objects hands out, and nothing else.

#include "support/error.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace training::pickle {

struct Value;

struct None {};
struct Tuple {
  std::vector<const Value*> items;
};
struct List {
  std::vector<const Value*> items;
};
struct Dict {
  std::vector<std::pair<const Value*, const Value*>> items;
};
/// Something of a Python module, as "module.name".
struct Global {
  std::string name;
};

using Data = std::variant<
    None,
    bool,
    int64_t,
    double,
    std::string,
    Tuple,
    List,
    Dict,
    Global,
    at::Tensor>;

/// What a pickle can put on its stack. Points to others that the same Unpickler
/// owns, and so may be part of itself, as in Python.
struct Value {
  Data data;

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
/// Throws:   Error if it ends early, names what Objects does not know, or needs
///           more than plain data does. `source` is the file to tell of.
class Unpickler final {
 public:
  Unpickler(std::string_view bytes, std::string source, Objects& objects)
      : bytes_(bytes), source_(std::move(source)), objects_(objects) {}

  /// The result, owned by this.
  const Value& run() {
    constexpr unsigned kStop = '.';
    while (true) {
      const unsigned opcode = byte();
      if (opcode == kStop) {
        return *pop();
      }
      step(opcode);
    }
  }

 private:
  void step(unsigned opcode) {
    switch (opcode) {
      case 0x80: // PROTO
        take(1);
        break;
      case 0x95: // FRAME
        take(8);
        break;
      case '(': // MARK
        marks_.push_back(stack_.size());
        break;
      case 'N': // NONE
        push(None{});
        break;
      case 0x88: // NEWTRUE
        push(true);
        break;
      case 0x89: // NEWFALSE
        push(false);
        break;
      case 'K': // BININT1
        push(integer(1));
        break;
      case 'M': // BININT2
        push(integer(2));
        break;
      case 'J': // BININT
        push(static_cast<int64_t>(static_cast<int32_t>(integer(4))));
        break;
      case 0x8a: // LONG1
        push(long_integer());
        break;
      case 'G': // BINFLOAT
        push(floating());
        break;
      case 0x8c: // SHORT_BINUNICODE
        push(std::string(take(length(1))));
        break;
      case 'X': // BINUNICODE
        push(std::string(take(length(4))));
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
      case ']': // EMPTY_LIST
        push(List{});
        break;
      case 'a': // APPEND
        append(pop_many(1));
        break;
      case 'e': // APPENDS
        append(pop_to_mark());
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
        const std::string module = line();
        push_global(module, line());
        break;
      }
      case 0x93: { // STACK_GLOBAL
        const std::string name = *expect<std::string>(pop());
        push_global(*expect<std::string>(pop()), name);
        break;
      }
      case 'R': { // REDUCE
        const Tuple& arguments = *expect<Tuple>(pop());
        push(objects_.call(expect<Global>(pop())->name, arguments));
        break;
      }
      case 'b': // BUILD: attributes, such as the _metadata of a state dict
        pop();
        expect<Dict>(top());
        break;
      case 'Q': // BINPERSID
        push(objects_.stored(*expect<Tuple>(pop())));
        break;
      default:
        throw support::Error(
            "expected " + source_ +
            " to hold a dict of tensors, but its pickle has the opcode " +
            std::to_string(opcode) +
            ", which that does not need. Write it with "
            "torch.save(model.state_dict(), file).");
    }
  }

  [[noreturn]] void stop_on_corruption() const {
    throw support::Error(
        "expected " + source_ +
        " to be whole, but its pickle is corrupt. Write it anew with "
        "torch.save(model.state_dict(), file).");
  }

  // --- The bytes -------------------------------------------------------------

  std::string_view take(uint64_t count) {
    if (count > bytes_.size() - position_) {
      stop_on_corruption();
    }
    const auto taken = bytes_.substr(position_, count);
    position_ += count;
    return taken;
  }

  unsigned byte() {
    return static_cast<unsigned char>(take(1).front());
  }

  /// The low byte comes first.
  uint64_t length(int count) {
    uint64_t value = 0;
    for (int index = 0; index < count; ++index) {
      value |= static_cast<uint64_t>(byte()) << (8 * index);
    }
    return value;
  }

  int64_t integer(int count) {
    return static_cast<int64_t>(length(count));
  }

  int64_t long_integer() {
    const auto count = static_cast<int>(byte());
    if (count > 8) {
      stop_on_corruption();
    }
    uint64_t value = length(count);
    const bool negative = count > 0 && (value >> (8 * count - 1)) == 1;
    for (int index = count; negative && index < 8; ++index) {
      value |= uint64_t{0xff} << (8 * index);
    }
    return static_cast<int64_t>(value);
  }

  double floating() {
    uint64_t bits = 0;
    for (int index = 0; index < 8; ++index) {
      bits = bits << 8 | byte(); // here, the high byte comes first
    }
    double value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  std::string line() {
    const auto end = bytes_.find('\n', position_);
    if (end == std::string_view::npos) {
      stop_on_corruption();
    }
    const std::string text(take(end - position_));
    take(1);
    return text;
  }

  // --- The stack and the memo --------------------------------------------------

  void push(Data data) {
    values_.push_back({std::move(data)});
    stack_.push_back(&values_.back());
  }

  Value* top() {
    const size_t bottom = marks_.empty() ? 0 : marks_.back();
    if (stack_.size() <= bottom) {
      stop_on_corruption();
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
      stop_on_corruption();
    }
    auto items = pop_many(stack_.size() - marks_.back());
    marks_.pop_back();
    return items;
  }

  template <class T>
  T* expect(Value* value) const {
    T* const found = std::get_if<T>(&value->data);
    if (found == nullptr) {
      stop_on_corruption();
    }
    return found;
  }

  void append(const std::vector<const Value*>& items) {
    auto& list = expect<List>(top())->items;
    list.insert(list.end(), items.begin(), items.end());
  }

  void set_items(const std::vector<const Value*>& items) {
    auto& dict = expect<Dict>(top())->items;
    if (items.size() % 2 != 0) {
      stop_on_corruption();
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
      stop_on_corruption();
    }
    stack_.push_back(found->second);
  }

  void push_global(const std::string& module, const std::string& name) {
    const std::string global = module + "." + name;
    if (!objects_.knows(global)) {
      throw support::Error(
          "expected " + source_ +
          " to hold a dict of tensors, but it needs Python's " + global +
          ", which is not run. Write it with torch.save(model.state_dict(), "
          "file).");
    }
    push(Global{global});
  }

  std::string_view bytes_;
  size_t position_ = 0;
  std::string source_;
  Objects& objects_;
  std::deque<Value> values_; // does not move what it holds
  std::vector<Value*> stack_;
  std::vector<size_t> marks_; // heights of the stack
  std::unordered_map<int64_t, Value*> memo_;
};

/// Writes a pickle of protocol 2, value by value in postfix order.
class Pickler final {
 public:
  Pickler() {
    add({'\x80', 2}); // PROTO
  }

  /// Between it and tuple() are the tuple's items, between it and set_items()
  /// the keys and values for the dict before it.
  Pickler& mark() {
    return add({'('});
  }
  Pickler& tuple() {
    return add({'t'});
  }
  Pickler& set_items() {
    return add({'u'});
  }
  Pickler& boolean(bool value) {
    return add({value ? '\x88' : '\x89'});
  }
  Pickler& integer(int64_t value) {
    add({'\x8a', 8}); // LONG1
    return number(static_cast<uint64_t>(value), 8);
  }
  Pickler& text(const std::string& value) {
    add({'X'}); // BINUNICODE
    number(value.size(), 4);
    bytes_ += value;
    return *this;
  }
  Pickler& integers(at::IntArrayRef values) {
    mark();
    for (const int64_t value : values) {
      integer(value);
    }
    return tuple();
  }
  Pickler& global(const std::string& module, const std::string& name) {
    bytes_ += "c" + module + "\n" + name + "\n";
    return *this;
  }
  /// Calls the global with the tuple, which are the last two values.
  Pickler& call() {
    return add({'R'}); // REDUCE
  }
  /// Refers to what is stored beside the pickle, by the tuple before it.
  Pickler& stored() {
    return add({'Q'}); // BINPERSID
  }

  std::string finish() {
    add({'.'}); // STOP
    return std::move(bytes_);
  }

 private:
  Pickler& add(std::initializer_list<char> bytes) {
    bytes_.append(bytes);
    return *this;
  }

  /// The low byte comes first.
  Pickler& number(uint64_t value, int count) {
    for (int index = 0; index < count; ++index) {
      bytes_ += static_cast<char>(value >> (8 * index) & 0xff);
    }
    return *this;
  }

  std::string bytes_;
};

} // namespace training::pickle

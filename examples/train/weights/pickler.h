// SPDX-License-Identifier: MIT
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

namespace training::pickle {

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
  Pickler& ordered_dict() {
    return global("collections", "OrderedDict").mark().tuple().call();
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

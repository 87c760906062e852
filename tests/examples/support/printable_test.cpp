// SPDX-License-Identifier: MIT

#include "support/printable.h"

#include <gtest/gtest.h>

#include <string>

namespace {

using namespace std::string_literals;
using support::printable;

TEST(Printable, LeavesPlainTextAlone) {
  EXPECT_EQ(printable(""), "");
  EXPECT_EQ(printable("layer1.0.conv1.weight"), "layer1.0.conv1.weight");
  EXPECT_EQ(printable(" \"quoted\" ~"), " \"quoted\" ~");
}

TEST(Printable, EscapesWhatATerminalWouldObey) {
  EXPECT_EQ(printable("\x1b]0;title\x07"), "\\x1b]0;title\\x07");
  EXPECT_EQ(printable("a\nb\rc\0d\x7f"s), "a\\x0ab\\x0dc\\x00d\\x7f");
  // CSI in Latin-1 and in UTF-8, and the mark that reverses what follows
  EXPECT_EQ(printable("\x9b"), "\\x9b");
  EXPECT_EQ(printable("\u009b"), "\\xc2\\x9b");
  EXPECT_EQ(printable("\u202e"), "\\xe2\\x80\\xae");
}

TEST(Printable, ShowsTwoTextsAlikeOnlyIfTheyAre) {
  EXPECT_EQ(printable("\\x1b"), "\\x5cx1b");
}

TEST(Printable, CutsWhatIsTooLong) {
  std::string text(80, 'a');
  EXPECT_EQ(printable(text), text);
  const std::string cut = printable(text + 'a');
  EXPECT_EQ(cut, text.append("..."));
  EXPECT_LT(printable(std::string(1000000, '\n')).size(), 400U);
}

} // namespace

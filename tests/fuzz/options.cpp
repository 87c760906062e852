// SPDX-License-Identifier: MIT

// A file of options, given as --config.

#include "fuzz.h"
#include "input_file.h"
#include "support/command_line.h"

#include <cstdint>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t count) {
  const fuzz::InputFile file(fuzz::input(bytes, count));
  fuzz::read_or_refuse([&] {
    std::string model;
    int64_t number = 0;
    double rate = 0;
    bool flag = false;
    std::vector<std::string> kinds;
    CLI::App app("", "program");
    support::add_common_options(app);
    app.add_option("MODEL", model)->required();
    app.add_option("--count", number)->check(support::count_from(1));
    app.add_option("--rate", rate)->check(support::number_up_to(1e30));
    app.add_option("--kinds", kinds)->delimiter(',');
    app.add_flag("--fast", flag);
    const std::string path = file.path().string();
    const char* arguments[] = {"program", "--config", path.c_str()};
    support::parse(app, 3, arguments);
  });
  return 0;
}

// SPDX-License-Identifier: MIT
#pragma once

#include "glow/config.h"
#include "glow/glow.h"

#include <torch/utils.h>

#include <string>
#include <utility>
#include <vector>

namespace glow {

namespace detail {

using Parametrizations =
    std::vector<std::pair<std::string, memcnn::Parametrization>>;

inline const Parametrizations& parametrizations() {
  static const Parametrizations all{
      {"lu", memcnn::kLU},
      {"orthogonal", memcnn::kOrthogonal},
      {"plain", memcnn::kPlain}};
  return all;
}

} // namespace detail

inline std::vector<std::string> parametrization_names() {
  std::vector<std::string> names;
  for (const auto& known : detail::parametrizations()) {
    names.push_back(known.first);
  }
  return names;
}

inline GlowOptions options_of(const Config& config) {
  GlowOptions options;
  options.levels(config.levels)
      .steps(config.steps)
      .width(config.width)
      .anchor_every(config.anchor_every);
  for (const auto& [name, value] : detail::parametrizations()) {
    if (name == config.parametrization) {
      options.parametrization(value);
    }
  }
  return options;
}

/// The flow of a configuration. The same seed gives the same weights under every
/// engine.
inline Glow make_model(const Config& config) {
  torch::manual_seed(config.seed);
  return Glow(options_of(config));
}

} // namespace glow

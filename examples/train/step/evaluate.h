// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/exact_range.h>

#include "train/data/batches.h"
#include "train/data/device_images.h"
#include "train/step/figures.h"
#include "train/step/learner.h"
#include "train/step/step_result.h"

#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

namespace training {

namespace detail {

/// What batches of test images have to tell, kept on their device.
struct TestFigures {
  std::vector<torch::Tensor> figures; // figures_of() each batch
  std::vector<torch::Tensor> hits; // of each image
};

/// Of every class by its number. `hits` says of each image whether it was
/// classified right.
inline std::vector<ClassResult> results_of_classes(
    int64_t num_classes,
    const torch::Tensor& labels,
    const torch::Tensor& hits) {
  std::vector<ClassResult> classes(static_cast<size_t>(num_classes));
  const auto* label = labels.const_data_ptr<int64_t>();
  const auto* hit = hits.const_data_ptr<bool>();
  for (int64_t image = 0; image < labels.numel(); ++image) {
    ClassResult& result = classes[static_cast<size_t>(label[image])];
    ++result.images;
    result.hits += hit[image] ? 1 : 0;
  }
  return classes;
}

/// Waits for the device. `labels` are those of all images, on the CPU.
inline Evaluation summed_up(
    const TestFigures& found,
    const torch::Tensor& labels,
    int64_t batch_size,
    int64_t num_classes) {
  Evaluation evaluation;
  Hits hits;
  const torch::Tensor figures = torch::stack(found.figures).cpu();
  const auto images = labels.numel();
  for (int64_t batch = 0; batch < figures.size(0); ++batch) {
    const int64_t first = batch * batch_size;
    const double loss = figures[batch][0].item<double>();
    if (!evaluation.not_finite_from && !std::isfinite(loss)) {
      evaluation.not_finite_from = first;
    }
    evaluation.loss +=
        loss * static_cast<double>(std::min(batch_size, images - first));
    hits += hits_of(figures[batch]);
  }
  const auto count = static_cast<double>(images);
  evaluation.loss /= count;
  evaluation.accuracy = static_cast<double>(hits.first) / count;
  evaluation.top5 = static_cast<double>(hits.top5) / count;
  evaluation.classes =
      results_of_classes(num_classes, labels, torch::cat(found.hits).cpu());
  return evaluation;
}

} // namespace detail

/// Classifies images, as they are, and waits for the device only at the end.
/// `go_on` is told the share done; where it returns false, the evaluation stops,
/// and nothing is returned.
///
/// Throws:   c10::ValueError if values left the range of the exact mode.
inline std::optional<Evaluation> evaluate(
    Learner& learner,
    const DeviceImages& images,
    int64_t batch_size,
    int64_t num_classes,
    const std::function<bool(double)>& go_on) {
  const torch::NoGradGuard no_grad;
  learner.network().eval();
  detail::TestFigures found;
  const int64_t count = images.size();
  for (int64_t first = 0; first < count; first += batch_size) {
    if (!go_on(static_cast<double>(first) / static_cast<double>(count))) {
      return std::nullopt;
    }
    const Batch batch = images.whole(first, batch_size);
    const auto [loss, hits] = learner.forward(batch);
    found.figures.push_back(figures_of(loss, hits));
    found.hits.push_back(hits.select(1, 0));
  }
  memcnn::check_exact_range(learner.device());
  return detail::summed_up(
      found, images.labels().cpu(), batch_size, num_classes);
}

} // namespace training

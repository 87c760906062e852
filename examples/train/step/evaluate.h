// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/exact_range.h>

#include "train/data/batches.h"
#include "train/data/device_images.h"
#include "train/step/figures.h"
#include "train/step/learner.h"
#include "train/step/step_result.h"
#include "train/team/team.h"

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

/// What batches of test images have to tell, every one that this process took,
/// kept on their device.
struct TestFigures {
  std::vector<torch::Tensor> figures; // figures_of() each batch
  std::vector<torch::Tensor> hits; // of each image
};

/// What all batches have to tell: figures_of() each, and then 1 for each image
/// that was classified right. Waits for the device.
///
/// A batch is of one process, and 0 elsewhere: its bits stay as they are.
inline torch::Tensor figures_of_all(
    const TestFigures& found,
    int64_t images,
    int64_t batch_size,
    Team& team) {
  const int64_t batches = (images + batch_size - 1) / batch_size;
  torch::Tensor all = torch::zeros({3 * batches + images}, torch::kFloat64);
  if (!found.figures.empty()) {
    const torch::Tensor figures = torch::stack(found.figures).cpu();
    const torch::Tensor hits = torch::cat(found.hits).cpu();
    for (int64_t i = 0, done = 0; i < figures.size(0); ++i) {
      const int64_t batch = team.rank() + i * team.size();
      const int64_t first = batch * batch_size;
      const int64_t count = std::min(batch_size, images - first);
      all.narrow(0, 3 * batch, 3).copy_(figures[i]);
      all.narrow(0, 3 * batches + first, count)
          .copy_(hits.narrow(0, done, count));
      done += count;
    }
  }
  return team.begin_sum(all)();
}

/// Of every class by its number. `hits` has 1 for each image that was classified
/// right.
inline std::vector<ClassResult> results_of_classes(
    int64_t num_classes,
    const torch::Tensor& labels,
    const torch::Tensor& hits) {
  std::vector<ClassResult> classes(static_cast<size_t>(num_classes));
  const auto* label = labels.const_data_ptr<int64_t>();
  const auto* hit = hits.const_data_ptr<double>();
  for (int64_t image = 0; image < labels.numel(); ++image) {
    ClassResult& result = classes[static_cast<size_t>(label[image])];
    ++result.images;
    result.hits += hit[image] != 0 ? 1 : 0;
  }
  return classes;
}

/// Of figures_of_all(). `labels` are those of all images, on the CPU.
inline Evaluation summed_up(
    const torch::Tensor& all,
    const torch::Tensor& labels,
    int64_t batch_size,
    int64_t num_classes) {
  Evaluation evaluation;
  Hits hits;
  const auto images = labels.numel();
  const torch::Tensor figures =
      all.narrow(0, 0, all.numel() - images).view({-1, 3});
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
  evaluation.classes = results_of_classes(
      num_classes, labels, all.narrow(0, figures.numel(), images));
  return evaluation;
}

} // namespace detail

/// Classifies images, as they are, and waits for the device only at the end.
/// `go_on` is told the share done; where it returns false, the evaluation stops,
/// and nothing is returned.
///
/// Processes take batches in turn, so that each batch is the one that a single
/// process takes, and so are the figures.
///
/// Throws:   c10::ValueError if values left the range of the exact mode.
inline std::optional<Evaluation> evaluate(
    Learner& learner,
    const DeviceImages& images,
    int64_t batch_size,
    int64_t num_classes,
    const std::function<bool(double)>& go_on) {
  const torch::NoGradGuard no_grad;
  Team& team = learner.team();
  learner.share_buffers();
  learner.network().eval();
  detail::TestFigures found;
  const int64_t count = images.size();
  for (int64_t round = 0; round < count; round += team.size() * batch_size) {
    team.meet();
    if (!go_on(static_cast<double>(round) / static_cast<double>(count))) {
      return std::nullopt;
    }
    const int64_t first = round + team.rank() * batch_size;
    if (first < count) {
      const auto [loss, hits] =
          learner.forward(images.whole(first, batch_size));
      found.figures.push_back(figures_of(loss, hits));
      found.hits.push_back(hits.select(1, 0));
    }
  }
  memcnn::check_exact_range(learner.device());
  return detail::summed_up(
      detail::figures_of_all(found, count, batch_size, team),
      images.labels().cpu(),
      batch_size,
      num_classes);
}

} // namespace training

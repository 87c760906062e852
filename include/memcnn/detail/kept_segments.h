// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/held_bytes.h>
#include <memcnn/detail/kept_choice.h>
#include <memcnn/detail/kept_results.h>
#include <memcnn/detail/run_results.h>
#include <memcnn/detail/saved_tensors.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/kept_activations.h>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

namespace memcnn::detail {

/// What one segment of a chain keeps of its only run: results of dear operators;
/// and its graph with all that it saves, while it is whole.
class KeptSegment {
 public:
  /// No `saved` where there is no graph. `held_anyway` costs nothing.
  KeptSegment(
      size_t position,
      std::shared_ptr<SavedTensors> saved,
      const Tensors& held_anyway)
      : position_(position), saved_(std::move(saved)) {
    for (const at::Tensor& tensor : held_anyway) {
      held_->pass_over(tensor);
    }
  }

  void keep_graph() {
    saved_->keep(held_);
    is_whole_ = true;
  }

  RunResults& results() {
    return results_;
  }

  /// Whether no second run comes to results that are not counted yet.
  bool leaves_out_rest() const {
    return saved_ != nullptr && saved_->may_stop();
  }

  bool is_whole() const {
    return is_whole_;
  }

  /// Whether its graph is of no use (Note [Early stop], rule 6).
  bool is_around_another() const {
    return saved_ != nullptr && saved_->is_around_another();
  }

  /// By its graph, once that is a candidate.
  const std::optional<KeptChoice::Rank>& rank() const {
    return rank_;
  }

  /// Its results are candidates, unless it is whole.
  void enter_results(KeptChoice& choice) {
    if (!is_whole_) {
      results_.enter(choice, position_);
    }
  }

  /// Its graph is a candidate.
  void enter_graph(KeptChoice& choice) {
    rank_ =
        choice.add(graph_worth(), graph_bytes(), position_, [this, &choice] {
          return give_up_graph(choice);
        });
  }

  /// Beyond its results.
  double graph_worth() const {
    return worth_of_graph(graph_bytes(), results_);
  }

  /// Lets those results go that a graph of this worth outlasts, unless it has
  /// them itself.
  void let_go_outranked(double worth) {
    results_.give_up_alone(worth);
  }

  /// Its results take its place in the choice. Returns the bytes that are free.
  int64_t give_up_graph(KeptChoice& choice) {
    const int64_t before = bytes();
    saved_->drop();
    is_whole_ = false;
    enter_results(choice);
    return before - bytes();
  }

  /// What a graph has needs not be kept beside it.
  void let_go_beside_graph() {
    if (is_whole_) {
      results_.let_go();
    }
  }

  int64_t bytes() const {
    return held_->total();
  }

  KeptActivations kept() const {
    const RunResults::Sums results = results_.kept();
    KeptActivations kept;
    kept.bytes = bytes();
    kept.multiply_adds = results_.multiply_adds();
    if (is_whole_) {
      kept.blocks = 1;
      kept.spared = kept.multiply_adds;
    } else {
      kept.results = results.count;
      kept.spared = results.multiply_adds;
    }
    return kept;
  }

 private:
  int64_t graph_bytes() const {
    return bytes() - results_.bytes_alone();
  }

  size_t position_;
  std::shared_ptr<SavedTensors> saved_;
  std::shared_ptr<HeldBytes> held_ = std::make_shared<HeldBytes>();
  RunResults results_{held_};
  bool is_whole_ = false;
  std::optional<KeptChoice::Rank> rank_;
};

/// What the segments of a chain keep within a budget of bytes (Note [Memory
/// budget], rule 5). Keeps results of the segment that runs.
class KeptSegments final : public ResultKeeper {
 public:
  /// So many segments may keep their graphs; 0: they keep results alone.
  KeptSegments(int64_t budget, int64_t graphs)
      : budget_(budget),
        graphs_(graphs),
        choice_(budget, [this] { return bytes(); }) {}

  /// Whether there is room for any result.
  bool keeps_results() const {
    return budget_ > 0;
  }

  /// The next segment begins to run. Its graph saves there, if it has one.
  void begin(std::shared_ptr<SavedTensors> saved, const Tensors& held_anyway) {
    const bool keeps_graph = graphs_ > 0 && saved != nullptr;
    segments_.emplace_back(segments_.size(), std::move(saved), held_anyway);
    if (keeps_graph) {
      running().keep_graph();
    }
  }

  bool keeps_next() override {
    return true;
  }

  void add(std::shared_ptr<KeptResults> results, size_t call) override {
    make_room();
    running().results().add(std::move(results), call);
  }

  /// Counts what is kept until here: second runs come as far as this.
  void make_room() {
    running().results().count();
    while (choice_.is_exceeded() && running().is_whole()) {
      make_room_for_graph();
    }
    running().enter_results(choice_);
    choice_.make_room();
  }

  /// The segment has run.
  void end() {
    if (running().leaves_out_rest()) {
      running().results().drop_uncounted();
    }
    if (running().is_whole() && running().is_around_another()) {
      running().give_up_graph(choice_);
    }
    make_room();
    if (running().is_whole()) {
      last_worth_ = will_stay_whole() ? kOutlastsAll : running().graph_worth();
      running().let_go_outranked(last_worth_);
      running().enter_graph(choice_);
    }
  }

  /// All segments have run. Says what is kept, if it was asked for.
  void end_all(KeptActivations* said) {
    for (KeptSegment& segment : segments_) {
      segment.let_go_beside_graph();
    }
    if (said != nullptr && !segments_.empty()) {
      *said = KeptActivations();
      for (const KeptSegment& segment : segments_) {
        *said += segment.kept();
      }
    }
  }

 private:
  static constexpr double kOutlastsAll =
      std::numeric_limits<double>::infinity();

  KeptSegment& running() {
    return segments_.back();
  }

  /// Whether no later segment will push the running one out, if those to come
  /// are like those that have run.
  bool will_stay_whole() {
    const bool is_last = static_cast<int64_t>(segments_.size()) == graphs_;
    const int64_t bytes_of_graphs = bytes() - running().results().bytes_alone();
    return is_last ||
        (std::all_of(
             segments_.begin(),
             segments_.end(),
             [](const KeptSegment& segment) { return segment.is_whole(); }) &&
         static_cast<double>(bytes_of_graphs) * static_cast<double>(graphs_) <=
             static_cast<double>(budget_) *
                 static_cast<double>(segments_.size()));
  }

  /// The worth of a graph is not known before its end. Until then whole segments
  /// make room for it, or it is given up; and it outlasts what that of the
  /// segment before does.
  void make_room_for_graph() {
    const KeptSegment* least = nullptr;
    for (const KeptSegment& segment : segments_) {
      if (segment.is_whole() && segment.rank() &&
          (least == nullptr || *segment.rank() < *least->rank())) {
        least = &segment;
      }
    }
    if (least == nullptr) {
      running().give_up_graph(choice_);
      return;
    }
    running().let_go_outranked(last_worth_);
    if (choice_.is_exceeded()) {
      choice_.give_up(*least->rank());
    }
  }

  int64_t bytes() const {
    int64_t sum = 0;
    for (const KeptSegment& segment : segments_) {
      sum += segment.bytes();
    }
    return sum;
  }

  int64_t budget_;
  int64_t graphs_;
  KeptChoice choice_;
  double last_worth_ = 0; // of a whole segment
  std::deque<KeptSegment> segments_;
};

} // namespace memcnn::detail

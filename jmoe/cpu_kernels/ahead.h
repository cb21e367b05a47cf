// Calls the rows that a thread needs next into its second-level cache while it multiplies those before: they lie on many
// pages, and a processor's own prefetcher stops at the end of each. A few lines at a time: a burst of more than the
// first-level cache may have under way would keep the codes' own loads waiting.
#pragma once

#include <cstdint>

#include "pieces.h"

namespace jmoe {
namespace {

class Ahead {
 public:
  static constexpr int64_t kStep = kBlock;

  // The rows of `piece`, and so many rows of the planes of columns.
  void plan(const Projection& w, const Piece& piece, int64_t columns) {
    if (piece.rows == 0) return;
    const FormatLayout& layout = kLayouts[(int)w.format];
    for (int p = 0; p < layout.planes; p++) {
      const PlaneLayout& plane = layout.plane[p];
      const int64_t entries = w.depth / plane.per, row = entries * plane.bytes;
      const int64_t first = piece.depth / plane.per, count = piece.weights / plane.per;
      const uint8_t* expert = w.planes[p] + piece.expert * w.outputs * row;
      if (plane.by_row) {
        const uint8_t* from = expert + piece.row * row + first * plane.bytes;
        if (count == entries)
          add_run(from, piece.rows * row);
        else
          for (int64_t r = 0; r < piece.rows; r++) add_run(from + r * row, count * plane.bytes);
      } else {
        for (int64_t at = 0; at < columns * plane.bytes; at += kLine)
          add({expert + (first * w.outputs + piece.row) * plane.bytes + at, w.outputs * plane.bytes, count});
      }
    }
  }

  // All of it while so much depth is multiplied.
  void spread(int64_t depth) { per_step_ = (lines_ * kStep + depth - 1) / depth; }

  // What goes with `depth`, a multiple of kStep.
  void step(int64_t depth) {
    for (int64_t n = per_step_ * (depth / kStep); n > 0 && at_ < count_;) {
      Lines& lines = lines_of_[at_];
      const int64_t now = n < lines.count ? n : lines.count;
      const uint8_t* from = lines.from;
      for (int64_t i = 0; i < now; i++, from += lines.step) __builtin_prefetch(from, 0, 2);
      lines.from = from;
      n -= now;
      if ((lines.count -= now) == 0) at_++;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Lines {
    const uint8_t* from;
    int64_t step, count;
  };
  void add_run(const uint8_t* from, int64_t bytes) {
    const int64_t before = (int64_t)((uintptr_t)from % kLine);
    add({from - before, kLine, (before + bytes + kLine - 1) / kLine});
  }
  void add(const Lines& lines) {
    lines_of_[count_++] = lines;
    lines_ += lines.count;
  }
  // A plane of rows takes up to kMaxLanes of them, one of columns up to kUnitRows * 4 bytes a row, 4 lines.
  Lines lines_of_[2 * (2 * kMaxLanes + 4 * kMaxPlanes)];
  int count_ = 0, at_ = 0;
  int64_t lines_ = 0, per_step_ = 0;
};

}  // namespace
}  // namespace jmoe

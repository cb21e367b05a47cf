// Calls the weights that a thread needs next into its second-level cache while it multiplies those before: rows lie on
// many pages, and a processor's own prefetcher stops at the end of each.
#pragma once

#include "kernels.h"

namespace jmoe {
namespace {

class Ahead {
 public:
  void plan(const Projection& w, const Unit& unit) {
    const FormatLayout& layout = kLayouts[(int)w.format];
    for (int p = 0; p < layout.planes && unit.rows; p++) {
      const PlaneLayout& plane = layout.plane[p];
      const int64_t entries = w.depth / plane.per, row = entries * plane.bytes, column = w.outputs * plane.bytes;
      const uint8_t* expert = w.planes[p] + unit.expert * w.outputs * row;
      const Region region = plane.by_row ? Region{expert + unit.row * row, 1, 0, unit.rows * row}
                                         : Region{expert + unit.row * plane.bytes, entries, column, unit.rows * plane.bytes};
      regions_[count_++] = region;
      lines_ += region.rows * ((region.bytes + kLine - 1) / kLine);
    }
  }

  // All of it in so many calls of step().
  void spread(int64_t steps) { per_step_ = (lines_ + steps - 1) / steps; }

  void step() {
    for (int64_t n = per_step_; n > 0 && at_ < count_; n--) {
      const Region& region = regions_[at_];
      __builtin_prefetch(region.from + row_ * region.stride + byte_, 0, 2);
      if ((byte_ += kLine) < region.bytes) continue;
      byte_ = 0;
      if (++row_ < region.rows) continue;
      row_ = 0;
      at_++;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Region {
    const uint8_t* from;
    int64_t rows, stride, bytes;
  };
  Region regions_[2 * kMaxPlanes];
  int count_ = 0, at_ = 0;
  int64_t lines_ = 0, per_step_ = 0, row_ = 0, byte_ = 0;
};

}  // namespace
}  // namespace jmoe

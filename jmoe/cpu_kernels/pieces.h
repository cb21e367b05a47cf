// The order in which a unit's weights are multiplied: in slabs of depth, all rows of one before any of the next.
//
// So what a slab's rows share, x and the lines of scales, is still in the second-level cache for the last of them,
// however deep a projection is. (Lines of scales may lie 4 KiB apart, and a cache holds few of those.)
#pragma once

#include "kernels.h"

namespace jmoe {
namespace {

// What is multiplied at once: as many rows of an expert's projection as an instruction set has lanes, or none, and
// `weights` of each from `depth` on.
struct Piece {
  int64_t expert, row, rows, depth, weights;
};

// Runs `of(piece, next, columns)` for the pieces of a unit of a projection so deep. `next` is what the thread multiplies
// then, the first of `after` behind the last. Its planes of columns share lines with those of the rows that follow:
// `columns` rows of them come with a slab's first piece, and with the others none.
template <int Lanes, class Of>
void by_pieces(const Unit& unit, const Unit& after, int64_t depth, Of of) {
  static_assert(Lanes <= kMaxLanes);
  const auto piece = [&](const Unit& u, int64_t row, int64_t from) {
    return Piece{u.expert, u.row + row, u.rows ? Lanes : 0, from, depth - from < kSlab ? depth - from : kSlab};
  };
  for (int64_t from = 0; from < depth; from += kSlab)
    for (int64_t row = 0; row < unit.rows; row += Lanes) {
      const Piece now = piece(unit, row, from);
      if (row + Lanes < unit.rows)
        of(now, piece(unit, row + Lanes, from), 0);
      else if (from + kSlab < depth)
        of(now, piece(unit, 0, from + kSlab), unit.rows);
      else
        of(now, piece(after, 0, 0), after.rows);
    }
}

}  // namespace
}  // namespace jmoe

// acc[c] += w . x[c] for up to 128 columns c of x: a tile of w is decoded once, then meets a few columns at a time.
#pragma once

#include "formats.h"

namespace jmoe {
namespace {

// A row of activations from some depth on.
struct Column {
  const float* values;
  const uint8_t* ints;
  const float* scales;
  const int32_t* sums;
};

inline Column column(const Activations& x, int64_t row, int64_t depth) {
  const int64_t at = row * x.depth + depth;
  return {x.values + at, x.ints + 2 * at, x.scales + at / kBlock, x.sums + at / 16};
}

// acc += sum over blocks of scale_x * (scale * sum (code - zero) * integer - low * sum integer)
template <class S, int N, int Weights, bool Low>
void multiply_ints(const Tile<S>& tile, int zero, int64_t blocks, const Column* x, typename S::F32* acc) {
  using F32 = typename S::F32;
  F32 y[N];
  for (int n = 0; n < N; n++) y[n] = acc[n];
  for (int b = 0; b < blocks; b++) {
    F32 block[N];
    for (int part = 0; part < kBlock / Weights; part++) {
      const int s = b * (kBlock / Weights) + part;
      int32_t sum_x[N];
      typename S::Sum sum[N];
      for (int n = 0; n < N; n++) {
        sum_x[n] = Weights == 16 ? x[n].sums[s] : x[n].sums[2 * b] + x[n].sums[2 * b + 1];
        sum[n] = S::start(-zero * sum_x[n]);
      }
      for (int i = s * Weights / 4; i < (s + 1) * Weights / 4; i++)
        for (int n = 0; n < N; n++) S::dot(sum[n], tile.codes[i], x[n].ints + 8 * i);
      for (int n = 0; n < N; n++) {
        F32 f = __builtin_convertvector(S::finish(sum[n]), F32) * tile.scale[s];
        if (Low) f -= tile.low[b] * (float)sum_x[n];
        block[n] = part ? block[n] + f : f;
      }
    }
    for (int n = 0; n < N; n++) y[n] += block[n] * x[n].scales[b];
  }
  for (int n = 0; n < N; n++) acc[n] = y[n];
}

// acc += sum w * x with w and x in f32
template <class S, int N, int Weights, bool Low>
void multiply_exact(const Tile<S>& tile, int zero, int64_t blocks, const Column* x, typename S::F32* acc) {
  using F32 = typename S::F32;
  F32 y[N];
  for (int n = 0; n < N; n++) y[n] = acc[n];
  for (int i = 0; i < 8 * blocks; i++) {
    const F32 scale = tile.scale[4 * i / Weights];
    for (int j = 0; j < 4; j++) {
      const auto code = (typename S::I32)((tile.codes[i] >> (8 * j)) & 255u) - zero;
      F32 w = __builtin_convertvector(code, F32) * scale;
      if (Low) w -= tile.low[i / 8];
      for (int n = 0; n < N; n++) y[n] += w * x[n].values[4 * i + j];
    }
  }
  for (int n = 0; n < N; n++) acc[n] = y[n];
}

template <class S, int N, int Weights, bool Low>
void multiply(bool exact, const Tile<S>& tile, int zero, int64_t blocks, const Column* x, int64_t n,
              typename S::F32* acc) {
  if constexpr (N > 1)
    if (n < N) return multiply<S, N - 1, Weights, Low>(exact, tile, zero, blocks, x, n, acc);
  (exact ? multiply_exact<S, N, Weights, Low> : multiply_ints<S, N, Weights, Low>)(tile, zero, blocks, x, acc);
}

template <class S, Format format>
void matmul_of(const Projection& w, int64_t expert, int64_t row, bool more, bool exact, const Activations& x,
               const int64_t* rows_of_x, int64_t columns, typename S::F32* acc) {
  using D = Decoder<S, format>;
  Tile<S> tile;
  for (int64_t depth = 0; depth < w.depth; depth += kChunk) {
    const int64_t weights = w.depth - depth < kChunk ? w.depth - depth : kChunk;
    D::decode(Window{w, expert, row, depth, weights, more}, tile);
    for (int64_t c = 0; c < columns; c += S::columns) {
      const int64_t n = columns - c < S::columns ? columns - c : S::columns;
      Column some[S::columns];
      for (int i = 0; i < n; i++) some[i] = column(x, rows_of_x[c + i], depth);
      multiply<S, S::columns, D::weights, D::low>(exact, tile, D::zero, weights / kBlock, some, n, acc + c);
    }
  }
}

// acc[c] = rows `row` .. of w . x[rows_of_x[c]]; `more`: the rows after them come next.
template <class S>
void matmul(const Projection& w, int64_t expert, int64_t row, bool more, bool exact, const Activations& x,
            const int64_t* rows_of_x, int64_t columns, typename S::F32* acc) {
  for (int64_t c = 0; c < columns; c++) acc[c] = typename S::F32{};
  const auto run = [&](auto of) { of(w, expert, row, more, exact, x, rows_of_x, columns, acc); };
  switch (w.format) {
    case Format::q4_k: return run(matmul_of<S, Format::q4_k>);
    case Format::q5_k: return run(matmul_of<S, Format::q5_k>);
    case Format::q6_k: return run(matmul_of<S, Format::q6_k>);
    case Format::q5_0: return run(matmul_of<S, Format::q5_0>);
    case Format::q8_0: return run(matmul_of<S, Format::q8_0>);
    case Format::q4_0: return run(matmul_of<S, Format::q4_0>);
    case Format::mxfp4: return run(matmul_of<S, Format::mxfp4>);
  }
}

}  // namespace
}  // namespace jmoe

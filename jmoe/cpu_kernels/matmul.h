// acc[c] = rows of w . x[c], for up to 128 columns c of x.
#pragma once

#include "ahead.h"
#include "formats.h"

namespace jmoe {
namespace {

// A row of activations from some depth on.
struct Column {
  const float* values;
  const uint8_t* ints;
  const float* scales;
  const float* sums;
};

inline Column column(const Activations& x, int64_t row, int64_t depth) {
  const int64_t at = row * x.depth + depth;
  const auto from = [](auto* array, int64_t entry) { return array ? array + entry : nullptr; };
  return {from(x.values, at), from(x.ints, row * ints_stride(x.depth) + 2 * depth), from(x.scales, at / kBlock), from(x.sums, kSums * at / kBlock)};
}

// What a sum of codes as they are, and as S::dot takes them, is too much by: low of each part of a block.
template <class S, class D>
constexpr bool has_low = D::has_low || D::zero != S::bias;

template <class S, class D>
inline typename S::F32 low_of(const D& decoder, int64_t part, typename S::F32 scale) {
  typename S::F32 low = scale * (float)(D::zero - S::bias);
  if constexpr (D::has_low) low += decoder.low(part);
  return low;
}

// The integers of a part of a block as one sum: sum codes * integer.
//
// Where an integer is two bytes, their sums stand apart for few columns, whose products would wait for each other, and
// in one register for many, which have enough to do and are spared the adding.
template <class S, int Vectors, int N, int Together>
[[gnu::always_inline]] inline void sum_products(const typename S::U32* codes, const Column* x, int64_t first,
                                                typename S::I32 (&sum)[Together][N]) {
  const auto each = [&](auto dot) {
    for (int i = 0; i < Vectors; i++)
      for (int p = 0; p < Together; p++)
        for (int n = 0; n < N; n++) dot(p, n, codes[p * Vectors + i], x[n].ints + 8 * (first + p * Vectors + i));
  };
  if constexpr (!S::two_bytes) {
    each([&](int p, int n, auto code, const uint8_t* ints) { S::dot(sum[p][n], code, ints); });
  } else if constexpr (N * Together < 8) {
    typename S::I32 high[Together][N] = {};
    each([&](int p, int n, auto code, const uint8_t* ints) {
      S::dot(high[p][n], code, ints);
      S::dot(sum[p][n], code, ints + 4);
    });
    for (int p = 0; p < Together; p++)
      for (int n = 0; n < N; n++) sum[p][n] += high[p][n] << 8;
  } else {
    each([&](int p, int n, auto code, const uint8_t* ints) { S::dot(sum[p][n], code, ints); });
    for (int p = 0; p < Together; p++)
      for (int n = 0; n < N; n++) sum[p][n] <<= 8;
    each([&](int p, int n, auto code, const uint8_t* ints) { S::dot(sum[p][n], code, ints + 4); });
  }
}

// y += scale_x * scale * sum code * integer - low * (scale_x * sum integer) for `Blocks` blocks of the columns from `b`.
template <class S, class D, int N, int Blocks>
[[gnu::always_inline]] inline void multiply_ints(const typename S::U32* codes, const typename S::F32* scale,
                                                 const typename S::F32* low, const Column* x, int64_t b,
                                                 typename S::F32* y) {
  constexpr int parts = kBlock / D::weights, vectors = 8 / parts, all = Blocks * parts;
  // Sums advance in turn, since each waits for its own last product; as many as the registers hold.
  constexpr int together = N * all <= 8 ? all : 1;
  typename S::F32 block[Blocks][N];
  for (int first = 0; first < all; first += together) {
    typename S::I32 sum[together][N] = {};
    sum_products<S, vectors, N, together>(codes + first * vectors, x, 8 * b + first * vectors, sum);
    for (int p = 0; p < together; p++)
      for (int n = 0; n < N; n++) {
        const int k = (first + p) / parts;
        const typename S::F32 f = to_f32<S>(sum[p][n]) * scale[first + p];
        block[k][n] = (first + p) % parts ? block[k][n] + f : f;
      }
  }
  // In the same order whatever N and Blocks are: a token's bits must not depend on its company.
  for (int k = 0; k < Blocks; k++)
    for (int n = 0; n < N; n++) {
      if (has_low<S, D>)
        for (int p = 0; p < parts; p++)
          y[n] -= low[k * parts + p] * x[n].sums[kSums * (b + k) + (parts == 2 ? p : 2)];
      y[n] += block[k][n] * x[n].scales[b + k];
    }
}

// y += sum w * x with w and x in f32.
template <class S, class D, int N>
[[gnu::always_inline]] inline void multiply_exact(const typename S::U32* codes, const typename S::F32* scale,
                                                  const typename S::F32* low, const Column* x, int64_t b,
                                                  typename S::F32* y) {
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 4; j++) {
      const auto code = (typename S::I32)((codes[i] >> (8 * j)) & 255u) - D::zero;
      typename S::F32 w = to_f32<S>(code) * scale[4 * i / D::weights];
      if (D::has_low) w -= low[4 * i / D::weights];
      for (int n = 0; n < N; n++) y[n] += w * x[n].values[kBlock * b + 4 * i + j];
    }
}

// Codes, scales and lows of a window.
template <class S>
struct Tile {
  typename S::U32 codes[kChunk / 4];
  typename S::F32 scale[kChunk / 16], low[kChunk / 16];
};

template <class S, class D, bool Exact>
[[gnu::noinline]] void decode(const Window& at, Tile<S>& tile) {
  D decoder(at);
  int64_t d = 0;
  for (; d + 2 * kBlock <= at.weights; d += 2 * kBlock) decoder.template codes<2>(d, tile.codes + d / 4);
  if (d < at.weights) decoder.template codes<1>(d, tile.codes + d / 4);
  for (int64_t s = 0; s < at.weights / D::weights; s++) tile.scale[s] = decoder.scale(s);
  if constexpr (Exact ? D::has_low : has_low<S, D>)
    for (int64_t s = 0; s < at.weights / D::weights; s++) {
      if constexpr (Exact)
        tile.low[s] = decoder.low(s);
      else
        tile.low[s] = low_of<S>(decoder, s, tile.scale[s]);
    }
}

// acc += tile . x for N columns.
template <class S, class D, int N, bool Exact>
[[gnu::noinline]] void multiply(const Tile<S>& tile, int64_t blocks, const Column* x, typename S::F32* acc) {
  constexpr int parts = kBlock / D::weights;
  typename S::F32 y[N];
  for (int n = 0; n < N; n++) y[n] = acc[n];
  for (int64_t b = 0; b < blocks; b++)
    (Exact ? multiply_exact<S, D, N> : multiply_ints<S, D, N, 1>)(tile.codes + 8 * b, tile.scale + parts * b,
                                                                  tile.low + parts * b, x, b, y);
  for (int n = 0; n < N; n++) acc[n] = y[n];
}

// acc += the window at `d`, `Blocks` blocks of it, . x
template <class S, class D, int N, int Blocks>
[[gnu::always_inline]] inline void multiply_next(D& decoder, int64_t d, const Column* x, typename S::F32* acc) {
  constexpr int parts = kBlock / D::weights;
  const int64_t b = d / kBlock;
  typename S::U32 codes[8 * Blocks];
  typename S::F32 scale[parts * Blocks], low[parts * Blocks];
  decoder.template codes<Blocks>(d, codes);
  for (int p = 0; p < parts * Blocks; p++) {
    scale[p] = decoder.scale(parts * b + p);
    if constexpr (has_low<S, D>) low[p] = low_of<S>(decoder, parts * b + p, scale[p]);
  }
  multiply_ints<S, D, N, Blocks>(codes, scale, low, x, b, acc);
}

// The same for N columns and a window that is decoded on the way, not stored.
template <class S, class D, int N>
[[gnu::noinline]] void multiply_decoding(const Window& at, const Column* x, typename S::F32* acc) {
  D decoder(at);
  typename S::F32 y[N];
  for (int n = 0; n < N; n++) y[n] = acc[n];
  int64_t d = 0;
  for (; d + 2 * kBlock <= at.weights; d += 2 * kBlock) multiply_next<S, D, N, 2>(decoder, d, x, y);
  if (d < at.weights) multiply_next<S, D, N, 1>(decoder, d, x, y);
  for (int n = 0; n < N; n++) acc[n] = y[n];
}

template <class S, class D, int N = S::columns>
void multiply_some(bool exact, const Tile<S>& tile, int64_t blocks, const Column* x, int64_t n,
                   typename S::F32* acc) {
  if constexpr (N > 1)
    if (n < N) return multiply_some<S, D, N - 1>(exact, tile, blocks, x, n, acc);
  (exact ? multiply<S, D, N, true> : multiply<S, D, N, false>)(tile, blocks, x, acc);
}

template <class S, Format format>
void matmul_of(const Projection& w, int64_t expert, int64_t row, bool exact, const Activations& x,
               const int64_t* rows_of_x, int64_t columns, Ahead& ahead, typename S::F32* acc) {
  using D = Decoder<S, format>;
  for (int64_t depth = 0; depth < w.depth; depth += kChunk) {
    ahead.step();
    const Window at{w, expert, row, depth, w.depth - depth < kChunk ? w.depth - depth : kChunk};
    Column some[S::columns];
    if (columns <= 2 && !exact) {
      for (int i = 0; i < columns; i++) some[i] = column(x, rows_of_x[i], depth);
      (columns == 1 ? multiply_decoding<S, D, 1> : multiply_decoding<S, D, 2>)(at, some, acc);
      continue;
    }
    Tile<S> tile;
    (exact ? decode<S, D, true> : decode<S, D, false>)(at, tile);
    for (int64_t c = 0; c < columns; c += S::columns) {
      const int64_t n = columns - c < S::columns ? columns - c : S::columns;
      for (int i = 0; i < n; i++) some[i] = column(x, rows_of_x[c + i], depth);
      multiply_some<S, D>(exact, tile, at.weights / kBlock, some, n, acc + c);
    }
  }
}

// acc[c] = rows `row` .. of w . x[rows_of_x[c]]
template <class S>
void matmul(const Projection& w, int64_t expert, int64_t row, bool exact, const Activations& x,
            const int64_t* rows_of_x, int64_t columns, Ahead& ahead, typename S::F32* acc) {
  for (int64_t c = 0; c < columns; c++) acc[c] = typename S::F32{};
  const auto run = [&](auto of) { of(w, expert, row, exact, x, rows_of_x, columns, ahead, acc); };
  switch (w.format) {
    case Format::q4_k: return run(matmul_of<S, Format::q4_k>);
    case Format::q5_k: return run(matmul_of<S, Format::q5_k>);
    case Format::q6_k: return run(matmul_of<S, Format::q6_k>);
    case Format::q5_0: return run(matmul_of<S, Format::q5_0>);
    case Format::q8_0: return run(matmul_of<S, Format::q8_0>);
    case Format::q4_0: return run(matmul_of<S, Format::q4_0>);
    case Format::mxfp4: return run(matmul_of<S, Format::mxfp4>);
    case Format::q3_k: return run(matmul_of<S, Format::q3_k>);
    case Format::q2_k: return run(matmul_of<S, Format::q2_k>);
    case Format::q5_1: return run(matmul_of<S, Format::q5_1>);
    case Format::q4_1: return run(matmul_of<S, Format::q4_1>);
    case Format::iq4_nl: return run(matmul_of<S, Format::iq4_nl>);
    case Format::iq4_xs: return run(matmul_of<S, Format::iq4_xs>);
  }
}

}  // namespace
}  // namespace jmoe

// acc[c] += a piece of w . x[c], for up to 128 columns c of x.
#pragma once

#include <type_traits>
#include <utility>

#include "ahead.h"
#include "formats.h"

namespace jmoe {
namespace {

// `count` columns, kUnitColumns at most: rows of values and blocks, and places from `place` on, of P, of blocks as words.
struct Columns {
  const Activations& x;
  const int64_t* rows;
  int64_t places, place, count;
};

// A row of activations from some depth on.
struct Column {
  const float* values;
  const Block* blocks;
};

inline Column column(const Activations& x, int64_t row, int64_t depth) {
  const int64_t at = row * x.depth + depth;
  return {x.values ? x.values + at : nullptr, x.blocks ? x.blocks + at / kBlock : nullptr};
}

// What a window adds to y for one column:
//
//   super += scale_x * sum of sc * (code - zero) * integer     of each block; and d * super to y at the window's end
//   y += d * scale_x * sum of (code - zero) * integer          where each block has its own d, instead
//   y -= low * (scale_x * sum of integers)
//
// Every way to the integers' sum ends here, so that a token's bits do not depend on its company.
template <class S, class D, class Block>
[[gnu::always_inline]] inline void add_block(typename S::F32& y, typename S::F32& super, typename S::I32 sum,
                                             const typename S::F32& d, const typename S::F32* low, const Block& x) {
  constexpr int parts = kBlock / D::weights;
  if constexpr (D::has_low)
    for (int p = 0; p < parts; p++) y -= low[p] * x.sums[parts == 2 ? p : 2];
  if constexpr (D::has_sc)
    super += to_f32<S>(sum) * x.scale;
  else
    y += to_f32<S>(sum) * d * x.scale;
}

// The integers of parts of blocks from `b` on, from vector `first` on, as one sum each: sum codes * integer.
//
// Where an integer is two bytes, their sums stand apart for few columns, whose products would wait for each other, and
// in one register for many, which have enough to do and are spared the adding.
template <class S, int Vectors, int N, int Together>
[[gnu::always_inline]] inline void sum_products(const typename S::U32* codes, const Column* x, int64_t b, int first,
                                                typename S::I32 (&sum)[Together][N]) {
  const auto each = [&](auto dot) {
    for (int i = 0; i < Vectors; i++)
      for (int p = 0; p < Together; p++)
        for (int n = 0; n < N; n++) {
          const int v = first + p * Vectors + i;
          dot(p, n, codes[v], x[n].blocks[b + v / 8].ints, v % 8);
        }
  };
  if constexpr (!S::two_bytes) {
    each([&](int p, int n, auto code, const uint8_t* ints, int i) { S::dot(sum[p][n], code, ints, i); });
  } else if constexpr (N * Together < 8) {
    typename S::I32 high[Together][N] = {};
    each([&](int p, int n, auto code, const uint8_t* ints, int i) {
      S::dot(high[p][n], code, ints, i);
      S::dot(sum[p][n], code, ints + 4, i);
    });
    for (int p = 0; p < Together; p++)
      for (int n = 0; n < N; n++) sum[p][n] += high[p][n] << 8;
  } else {
    each([&](int p, int n, auto code, const uint8_t* ints, int i) { S::dot(sum[p][n], code, ints, i); });
    for (int p = 0; p < Together; p++)
      for (int n = 0; n < N; n++) sum[p][n] <<= 8;
    each([&](int p, int n, auto code, const uint8_t* ints, int i) { S::dot(sum[p][n], code, ints + 4, i); });
  }
}

// What up to `Most` blocks of codes are multiplied with: sc and low by part, d by block. Read all at once: they come from
// lines of their own, which would be waited for one after the other.
template <class S, class D, int Most = kChunk / kBlock>
struct Factors {
  static constexpr int parts = kBlock / D::weights;
  typename S::I32 sc[Most * parts];
  typename S::F32 d[Most], low[Most * parts];

  [[gnu::always_inline]] Factors(const D& decoder, int64_t first, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) d[b] = decoder.d(first + b);
    for (int64_t p = 0; p < blocks * parts; p++) {
      if constexpr (D::has_sc) sc[p] = decoder.sc(first * parts + p);
      if constexpr (D::has_low) low[p] = decoder.low(first * parts + p);
    }
  }
};

// block += sc * sum of (code - zero) * integer for part `p` of the blocks from `b` on.
template <class S, class D, int N>
[[gnu::always_inline]] inline void weigh(typename S::I32 (&sum)[N], int p, const typename S::I32* sc, const Column* x,
                                         int64_t b, typename S::I32 (*block)[N]) {
  constexpr int parts = kBlock / D::weights;
  for (int n = 0; n < N; n++) {
    typename S::I32& s = sum[n];
    if constexpr (constexpr int32_t zero = D::zero - S::bias; zero != 0)
      s -= x[n].blocks[b + p / parts].totals[parts == 2 ? p % 2 : 2] * zero;
    if constexpr (D::has_sc) s *= sc[p];
    block[p / parts][n] = p % parts ? block[p / parts][n] + s : s;
  }
}

// y += the products of `Blocks` blocks of codes with the columns from block `b`; sc and low by part, d by block.
template <class S, class D, int N, int Blocks>
[[gnu::always_inline]] inline void multiply_ints(const typename S::U32* codes, const typename S::I32* sc,
                                                 const typename S::F32* d, const typename S::F32* low, const Column* x,
                                                 int64_t b, typename S::F32* y, typename S::F32* super) {
  constexpr int parts = kBlock / D::weights, vectors = 8 / parts, all = Blocks * parts;
  // Sums advance in turn, since each waits for its own last product; as many as the registers hold.
  constexpr int together = N * all <= 8 ? all : 1;
  typename S::I32 block[Blocks][N];
  for (int first = 0; first < all; first += together) {
    typename S::I32 sum[together][N] = {};
    sum_products<S, vectors, N, together>(codes, x, b, first * vectors, sum);
    for (int p = 0; p < together; p++) weigh<S, D, N>(sum[p], first + p, sc, x, b, block);
  }
  for (int k = 0; k < Blocks; k++)
    for (int n = 0; n < N; n++) add_block<S, D>(y[n], super[n], block[k][n], d[k], low + k * parts, x[n].blocks[b + k]);
}

// The same of the two blocks at depth `d` of a window, by rows: two at a time, so that registers hold all there is. Sums
// of a row's neighbours are added up until a lane is a row.
template <class S, class D, int N>
[[gnu::always_inline]] inline void multiply_rows(D& decoder, int64_t d, const Column* x, typename S::F32* y,
                                                 typename S::F32* super) {
  constexpr int parts = kBlock / D::weights;
  const int64_t b = d / kBlock;
  typename S::I32 twos[2][N], fours[2][2][N];
#pragma GCC unroll 4
  for (int r = 0; r < S::lanes; r += 2) {
    typename S::U32 even[4], odd[4];  // two rows of block 0, then of block 1
    const auto packed = decoder.template load<2>(d, r);
    if constexpr (D::is_plain) {
      packed.words_of_16(even, odd);
    } else {
      typename S::U32 codes[4];
      decoder.template codes<2>(packed, d, r, codes);
      for (int i = 0; i < 4; i++) {
        even[i] = S::even(codes[i]);
        odd[i] = S::odd(codes[i]);
      }
    }
    for (int k = 0; k < 2; k++)
      for (int n = 0; n < N; n++) {
        const uint8_t* ints = x[n].blocks[b + k].ints;
        const auto two = S::add_up_two(S::dot_row(even[2 * k], odd[2 * k], ints),
                                       S::dot_row(even[2 * k + 1], odd[2 * k + 1], ints));
        if (r % 4 == 0)
          twos[k][n] = two;
        else
          fours[r / 4][k][n] = S::add_up_four(twos[k][n], two);
      }
  }
  const Factors<S, D, 2> of(decoder, b, 2);
  typename S::I32 block[2][N];
  for (int k = 0; k < 2; k++) {
    typename S::I32 sum[parts][N];
    for (int n = 0; n < N; n++) {
      const auto first = S::first_half(fours[0][k][n], fours[1][k][n]);
      const auto second = S::second_half(fours[0][k][n], fours[1][k][n]);
      sum[0][n] = parts == 2 ? first : first + second;
      if constexpr (parts == 2) sum[1][n] = second;
      if (D::is_plain && k == 1) sum[0][n] >>= 4;  // words_of_16 has them times 16
    }
    for (int p = 0; p < parts; p++) weigh<S, D, N>(sum[p], k * parts + p, of.sc, x, b, block);
    for (int n = 0; n < N; n++)
      add_block<S, D>(y[n], super[n], block[k][n], of.d[k], of.low + k * parts, x[n].blocks[b + k]);
  }
}

// y += sum w * x with w and x in f32.
template <class S, class D, int N>
[[gnu::always_inline]] inline void multiply_exact(const typename S::U32* codes, const typename S::I32* sc,
                                                  const typename S::F32& d, const typename S::F32* low,
                                                  const Column* x, int64_t b, typename S::F32* y) {
  for (int i = 0; i < 8; i++) {
    const int part = 4 * i / D::weights;
    const typename S::F32 scale = D::has_sc ? d * to_f32<S>(sc[part]) : d;
    for (int j = 0; j < 4; j++) {
      const auto code = (typename S::I32)((codes[i] >> (8 * j)) & 255u) - D::zero;
      typename S::F32 w = to_f32<S>(code) * scale;
      if (D::has_low) w -= low[part];
      for (int n = 0; n < N; n++) y[n] += w * x[n].values[kBlock * b + 4 * i + j];
    }
  }
}

// Codes from depth `d` of a window on, loaded and taken apart.
template <int Blocks, class D, class U32>
inline void load_codes(D& decoder, int64_t d, U32* codes) {
  decoder.template codes<Blocks>(decoder.template load<Blocks>(d), d, 0, codes);
}

// A window decoded: its codes as they are, and their factors.
template <class S, class D>
struct Tile {
  typename S::U32 codes[kChunk / 4];
  Factors<S, D> factors;

  [[gnu::noinline]] explicit Tile(const Window& at) : Tile(at, D(at)) {}

 private:
  Tile(const Window& at, D decoder) : factors(decoder, 0, at.weights / kBlock) {
    int64_t d = 0;
    for (; d + 2 * kBlock <= at.weights; d += 2 * kBlock) load_codes<2>(decoder, d, codes + d / 4);
    if (d < at.weights) load_codes<1>(decoder, d, codes + d / 4);
  }
};

// acc += tile . x for N columns.
template <class S, class D, bool Exact, int N>
[[gnu::noinline]] void multiply(const Tile<S, D>& tile, int64_t blocks, const Column* x, typename S::F32* acc) {
  constexpr int parts = kBlock / D::weights;
  typename S::F32 y[N], super[N] = {};
  for (int n = 0; n < N; n++) y[n] = acc[n];
  for (int64_t b = 0; b < blocks; b++) {
    const typename S::U32* codes = tile.codes + 8 * b;
    const typename S::I32* sc = tile.factors.sc + parts * b;
    const typename S::F32 *d = tile.factors.d + b, *low = tile.factors.low + parts * b;
    if constexpr (Exact)
      multiply_exact<S, D, N>(codes, sc, *d, low, x, b, y);
    else
      multiply_ints<S, D, N, 1>(codes, sc, d, low, x, b, y, super);
  }
  for (int n = 0; n < N; n++) acc[n] = Exact || !D::has_sc ? y[n] : y[n] + tile.factors.d[0] * super[n];
}

template <class S>
constexpr bool any_halved() {
  for (int group = 0; group < kBlock / 4; group++)
    if (S::is_halved(group)) return true;
  return false;
}

// A block of weights as 16-bit integers w = sc * (code - zero); a code times sc is a product of bytes, sc's with a
// sign: those without one have six bits. Of the groups of four for which S::is_halved(group) holds, half the
// multiplications (Winograd 1968):
//
//   w0 x0 + w1 x1 = (w0 + x1) (w1 + x0) - w0 w1 - x0 x1
//
// Worth it where the processor has additions to spare. Sums of products overflow, which is harmless: modulo 2^32 what is
// left at the end is right, and fits (kLargestTotal).
template <class S, class D>
struct WordWeights {
  static constexpr int parts = kBlock / D::weights;
  typename S::U32 even[8], odd[8];  // of each four weights the two, 16 bits each
  typename S::U32 products;         // sum of w0 w1 where they are halved
  typename S::F32 d, low[parts];

  WordWeights(const Factors<S, D>& of, int64_t b, const typename S::U32* codes) : products{}, d(of.d[b]) {
    const auto twice = [](typename S::U32 integers) { return (integers & 0xffffu) * 0x10001u; };
    for (int p = 0; p < parts; p++) {
      typename S::U32 zero = typename S::U32{} + (uint32_t)D::zero, sc = {};
      if constexpr (D::has_sc) {
        zero *= (typename S::U32)of.sc[parts * b + p];
        sc = twice((typename S::U32)of.sc[parts * b + p] & 255u);
      }
      zero = twice(zero);
      for (int i = p * 8 / parts; i < (p + 1) * 8 / parts; i++) {
        if constexpr (D::has_sc) {
          even[i] = S::multiply_bytes(codes[i], sc);
          odd[i] = S::multiply_bytes(codes[i], sc << 8);
        } else {
          even[i] = codes[i] & 0x00ff00ffu;
          odd[i] = (codes[i] >> 8) & 0x00ff00ffu;
        }
        even[i] = S::subtract_words(even[i], zero);
        odd[i] = S::subtract_words(odd[i], zero);
        if (S::is_halved(i)) S::dot_words(products, even[i], odd[i]);
      }
      if constexpr (D::has_low) low[p] = of.low[parts * b + p];
    }
  }

  // With the blocks x of N columns. A window's first block begins `super`, its last one adds it to y: passes of their own
  // over all columns took 1%.
  template <int N>
  [[gnu::always_inline]] inline void multiply(const WordBlock* x, bool is_first, bool is_last, typename S::F32* y,
                                              typename S::F32* super) const {
    typename S::U32 sum[N];
    for (int n = 0; n < N; n++) {
      sum[n] = typename S::U32{};
      if constexpr (any_halved<S>()) sum[n] = -products - x[n].products;
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
      for (int n = 0; n < N; n++) {
        const uint8_t *x_even = x[n].pairs + 8 * i, *x_odd = x_even + 4;
        if (S::is_halved(i)) {
          S::dot_words(sum[n], S::add_words(even[i], S::words(x_odd)), S::add_words(odd[i], S::words(x_even)));
        } else {
          sum[n] = S::dot_word(sum[n], even[i], x_even);
          sum[n] = S::dot_word(sum[n], odd[i], x_odd);
        }
      }
    const auto add = [&](auto first, auto last) {
      for (int n = 0; n < N; n++) {
        typename S::F32 to = y[n], window = {};
        if constexpr (D::has_sc && !first) window = super[n];
        add_block<S, D>(to, window, (typename S::I32)sum[n], d, low, x[n]);
        if constexpr (D::has_sc && last) to += d * window;
        if constexpr (D::has_sc && !last) super[n] = window;
        y[n] = to;
      }
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (is_first)
      is_last ? add(yes, yes) : add(yes, no);
    else
      is_last ? add(no, yes) : add(no, no);
  }
};

// acc += the window . x; x has `stride` columns from a block to the next. A block of weights is decoded into registers
// and stays there for all columns.
template <class S, class D>
[[gnu::noinline]] void multiply_words(const Window& at, const WordBlock* x, int64_t stride, int64_t columns,
                                       Ahead& ahead, typename S::F32* acc) {
  D decoder(at);
  typename S::F32 super[kUnitColumns];
  typename S::U32 codes[16];
  const int64_t blocks = at.weights / kBlock;
  const Factors<S, D> factors(decoder, 0, blocks);
  for (int64_t b = 0; b < blocks; b++, x += stride) {
    ahead.step(kBlock);
    if (b % 2 == 0) {
      if (b + 2 <= blocks)
        load_codes<2>(decoder, kBlock * b, codes);
      else
        load_codes<1>(decoder, kBlock * b, codes);
    }
    const WordWeights<S, D> weights(factors, b, codes + 8 * (b % 2));
    int64_t c = 0;
    const auto by = [&](auto n) {
      for (; c + n <= columns; c += n) {
        // The next block's, which processors do not see coming.
        for (size_t line = 0; line < n * sizeof *x; line += 64) __builtin_prefetch((const char*)(x + stride + c) + line);
        weights.template multiply<n>(x + c, b == 0, b + 1 == blocks, acc + c, super + c);
      }
    };
    by(std::integral_constant<int, S::word_columns>{});
    by(std::integral_constant<int, 4>{});
    by(std::integral_constant<int, 1>{});
  }
}

// y += the window at `d`, `Blocks` blocks of it as loaded, . x
template <class S, int N, int Blocks, class D, class Packed>
[[gnu::always_inline]] inline void multiply_loaded(D& decoder, const Packed& packed, int64_t d, const Column* x,
                                                  typename S::F32* y, typename S::F32* super) {
  const int64_t b = d / kBlock;
  typename S::U32 codes[8 * Blocks];
  decoder.template codes<Blocks>(packed, d, 0, codes);
  const Factors<S, D, Blocks> of(decoder, b, Blocks);
  multiply_ints<S, D, N, Blocks>(codes, of.sc, of.d, of.low, x, b, y, super);
}

// A piece's window at `depth`.
inline Window window(const Projection& w, const Piece& piece, int64_t depth) {
  const int64_t left = piece.depth + piece.weights - depth;
  return {w, piece.expert, piece.row, depth, left < kChunk ? left : kChunk};
}

// acc += the piece of w . x for N columns, decoded on the way and not stored, by what S has for few columns. Where
// codes are transposed, the next are loaded before the products of those at hand: one does not wait for the other, and
// transposing leaves multipliers idle.
template <class S, Format format, int N>
[[gnu::noinline]] void multiply_decoding(const Projection& w, const Piece& piece, const Columns& columns, Ahead& ahead,
                                         typename S::F32* acc) {
  using Few = typename S::FewColumns;
  using D = Decoder<Few, format>;
  typename S::F32 y[N];
  for (int n = 0; n < N; n++) y[n] = acc[n];
  const int64_t end = piece.depth + piece.weights;
  decltype(std::declval<D>().template load<2>(0)) now;
  for (int64_t depth = piece.depth; depth < end; depth += kChunk) {
    const Window at = window(w, piece, depth);
    D decoder(at);
    if (!Few::by_rows && depth == piece.depth && at.weights >= 2 * kBlock) now = decoder.template load<2>(0);
    Column x[N];
    for (int n = 0; n < N; n++) x[n] = column(columns.x, columns.rows[n], depth);
    typename S::F32 super[N] = {};
    int64_t d = 0;
    for (; d + 2 * kBlock <= at.weights; d += 2 * kBlock) {
      ahead.step(2 * kBlock);
      if constexpr (!Few::by_rows) {
        const auto next = decoder.template load<2>(depth + d + 4 * kBlock <= end ? d + 2 * kBlock : d);
        multiply_loaded<Few, N, 2>(decoder, now, d, x, y, super);
        now = next;
      } else {
        multiply_rows<Few, D, N>(decoder, d, x, y, super);
      }
    }
    if (d < at.weights) {  // an odd block has 16 bytes of 4-bit codes
      Decoder<S, format> transposed(at);
      multiply_loaded<S, N, 1>(transposed, transposed.template load<1>(d), d, x, y, super);
    }
    if constexpr (D::has_sc)
      for (int n = 0; n < N; n++) y[n] += decoder.d(0) * super[n];
  }
  for (int n = 0; n < N; n++) acc[n] = y[n];
}

// run(n) with n, 1 to N, as a constant.
template <int N, class Run>
void with_constant(int64_t n, Run run) {
  if constexpr (N > 1)
    if (n < N) return with_constant<N - 1>(n, run);
  run(std::integral_constant<int, N>{});
}

// acc += the window . x for any number of columns.
template <class S, class D, bool Exact>
void multiply_by_tile(const Window& at, const Columns& x, typename S::F32* acc) {
  const Tile<S, D> tile(at);
  for (int64_t c = 0; c < x.count; c += S::columns) {
    const int64_t n = x.count - c < S::columns ? x.count - c : S::columns;
    Column some[S::columns];
    for (int i = 0; i < n; i++) some[i] = column(x.x, x.rows[c + i], at.depth);
    with_constant<S::columns>(
        n, [&](auto count) { multiply<S, D, Exact, count>(tile, at.weights / kBlock, some, acc + c); });
  }
}

template <class S, Format format>
void matmul_of(const Projection& w, const Piece& piece, bool exact, const Columns& x, Ahead& ahead,
               typename S::F32* acc) {
  using D = Decoder<S, format>;
  if (!exact && x.count <= S::few_columns)
    return with_constant<S::few_columns>(
        x.count, [&](auto count) { multiply_decoding<S, format, count>(w, piece, x, ahead, acc); });
  for (int64_t depth = piece.depth; depth < piece.depth + piece.weights; depth += kChunk) {
    const Window at = window(w, piece, depth);
    if (!exact && x.count >= S::words_from) {
      if constexpr (S::words_from <= kUnitColumns)
        multiply_words<S, D>(at, x.x.words + depth / kBlock * x.places + x.place, x.places, x.count, ahead, acc);
      continue;
    }
    ahead.step(kChunk);
    if (exact)
      multiply_by_tile<S, D, true>(at, x, acc);
    else
      multiply_by_tile<S, D, false>(at, x, acc);
  }
}

// acc[c] += the piece of w . column c of x
template <class S>
void matmul(const Projection& w, const Piece& piece, bool exact, const Columns& x, Ahead& ahead,
            typename S::F32* acc) {
  const auto run = [&](auto of) { of(w, piece, exact, x, ahead, acc); };
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

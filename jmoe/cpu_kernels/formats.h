// Tiles of weights: `lanes` rows by up to 256 of depth, decoded from the planes of jmoe/formats as they lie.
//
//   w = scale * (code - zero) - low      scale of 32 or 16 weights, low of 32 where the format has mins
#pragma once

#include <cstring>

#include "kernels.h"

namespace jmoe {
namespace {

template <class S>
struct Tile {
  using U32 = typename S::U32;
  using F32 = typename S::F32;
  U32 codes[kChunk / 4];     // codes of weights 4 i .. 4 i + 3 in each lane's bytes, u8
  F32 scale[kChunk / 16];    // one for each Decoder::weights
  F32 low[kChunk / kBlock];
};

// A window of a projection: `lanes` rows of one expert from `row`, `weights` of depth from `depth`.
struct Window {
  const Projection& w;
  int64_t expert, row, depth, weights;
  bool more;  // the rows below this window's are next: worth fetching

  // A plane that holds a row's bytes together, `per` weights a byte.
  const uint8_t* bytes(int plane, int per) const {
    return w.planes[plane] + ((expert * w.outputs + row) * w.depth + depth) / per;
  }
  // A plane with the rows' entries side by side, one for `per` weights; entry 0 is this window's first.
  template <class T>
  const T* column(int plane, int per, int64_t entry) const {
    const int64_t at = (expert * (w.depth / per) + depth / per + entry) * w.outputs + row;
    return reinterpret_cast<const T*>(w.planes[plane]) + at;
  }
};

template <class S, class T, int Bytes = sizeof(T) * S::lanes>
inline auto load(const T* from) {
  typedef T V __attribute__((vector_size(Bytes)));
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class S, class T>
inline typename S::F32 load_f32(const T* integers) {
  return __builtin_convertvector(__builtin_convertvector(load<S>(integers), typename S::I32), typename S::F32);
}

// 32 bytes of each row as eight vectors of four bytes; the rows of the next tile are called into the cache.
template <class S>
inline void rows32(const uint8_t* from, int64_t stride, bool more, typename S::U32* out) {
  if (more && (reinterpret_cast<uintptr_t>(from) & 32) == 0)
    for (int r = 0; r < S::lanes; r++) __builtin_prefetch(from + (S::lanes + r) * stride, 0, 2);
  S::transpose(from, stride, out);
}

template <class S>
inline void rows16(const uint8_t* from, int64_t stride, typename S::U32* out) {
  for (int i = 0; i < 4; i++)
    for (int r = 0; r < S::lanes; r++) {
      uint32_t word;
      memcpy(&word, from + r * stride + 4 * i, 4);
      out[i][r] = word;
    }
}

// 4-bit codes: 32 bytes hold weight j in the low and j + 32 in the high nibble; an odd last 16 bytes i and i + 16.
template <class S>
inline void nibbles(const Window& at, int plane, Tile<S>& tile) {
  const uint8_t* from = at.bytes(plane, 2);
  const int64_t stride = at.w.depth / 2;
  typename S::U32 packed[8];
  int64_t d = 0;
  for (; d + 64 <= at.weights; d += 64) {
    rows32<S>(from + d / 2, stride, at.more, packed);
    for (int i = 0; i < 8; i++) {
      tile.codes[d / 4 + i] = packed[i] & 0x0f0f0f0fu;
      tile.codes[d / 4 + 8 + i] = (packed[i] >> 4) & 0x0f0f0f0fu;
    }
  }
  if (d < at.weights) {
    rows16<S>(from + d / 2, stride, packed);
    for (int i = 0; i < 4; i++) {
      tile.codes[d / 4 + i] = packed[i] & 0x0f0f0f0fu;
      tile.codes[d / 4 + 4 + i] = (packed[i] >> 4) & 0x0f0f0f0fu;
    }
  }
}

// d, one f16 for each 32 weights, as the tile's scales.
template <class S>
inline void scales_d(const Window& at, int plane, Tile<S>& tile) {
  for (int b = 0; b < at.weights / kBlock; b++) tile.scale[b] = S::halves(at.column<uint16_t>(plane, 32, b));
}

// scale = d * sc and low = dmin * m of Q4_K and Q5_K, whose planes from `first` are sc, m, d, dmin.
template <class S>
inline void scales_k(const Window& at, int first, Tile<S>& tile) {
  const auto d = S::halves(at.column<uint16_t>(first + 2, 256, 0));
  const auto dmin = S::halves(at.column<uint16_t>(first + 3, 256, 0));
  for (int b = 0; b < kChunk / kBlock; b++) {
    tile.scale[b] = d * load_f32<S>(at.column<uint8_t>(first, 32, b));
    tile.low[b] = dmin * load_f32<S>(at.column<uint8_t>(first + 1, 32, b));
  }
}

template <class S, Format>
struct Decoder;

template <class S>
struct Decoder<S, Format::q4_k> {  // codes, scales, mins, d, dmin
  static constexpr int weights = 32, zero = 0;
  static constexpr bool low = true;
  static void decode(const Window& at, Tile<S>& tile) {
    nibbles(at, 0, tile);
    scales_k(at, 1, tile);
  }
};

template <class S>
struct Decoder<S, Format::q5_k> {  // codes, high, scales, mins, d, dmin
  static constexpr int weights = 32, zero = 0;
  static constexpr bool low = true;
  static void decode(const Window& at, Tile<S>& tile) {
    nibbles(at, 0, tile);
    typename S::U32 high[8];  // bit b of byte j: weight j of sub-block b
    rows32<S>(at.bytes(1, 8), at.w.depth / 8, at.more, high);
    for (int b = 0; b < 8; b++)
      for (int i = 0; i < 8; i++) tile.codes[8 * b + i] |= ((high[i] >> b) & 0x01010101u) << 4;
    scales_k(at, 2, tile);
  }
};

template <class S>
struct Decoder<S, Format::q6_k> {  // codes, high, scales, d
  static constexpr int weights = 16, zero = 32;
  static constexpr bool low = false;
  static void decode(const Window& at, Tile<S>& tile) {
    nibbles(at, 0, tile);
    for (int half = 0; half < 2; half++) {
      typename S::U32 high[8];  // bits 2 b, 2 b + 1 of byte j: weight j of the half's sub-block b
      rows32<S>(at.bytes(1, 4) + 32 * half, at.w.depth / 4, at.more, high);
      for (int b = 0; b < 4; b++)
        for (int i = 0; i < 8; i++) tile.codes[32 * half + 8 * b + i] |= ((high[i] >> (2 * b)) & 0x03030303u) << 4;
    }
    const auto d = S::halves(at.column<uint16_t>(3, 256, 0));
    for (int s = 0; s < kChunk / 16; s++) tile.scale[s] = d * load_f32<S>(at.column<int8_t>(2, 16, s));
  }
};

template <class S>
struct Decoder<S, Format::q5_0> {  // codes, high, d
  static constexpr int weights = 32, zero = 16;
  static constexpr bool low = false;
  static void decode(const Window& at, Tile<S>& tile) {
    nibbles(at, 0, tile);
    for (int b = 0; b < at.weights / kBlock; b++) {
      const auto high = load<S>(at.column<uint32_t>(1, 32, b));  // bit i: weight i
      for (int i = 0; i < 8; i++)
        // Bits 0..3 to bytes 0..3: the product shifts bit j by 7 j.
        tile.codes[8 * b + i] |= ((((high >> (4 * i)) & 15u) * 0x00204081u) & 0x01010101u) << 4;
    }
    scales_d(at, 2, tile);
  }
};

template <class S>
struct Decoder<S, Format::q8_0> {  // codes, d
  static constexpr int weights = 32, zero = 128;
  static constexpr bool low = false;
  static void decode(const Window& at, Tile<S>& tile) {
    for (int b = 0; b < at.weights / kBlock; b++) {
      rows32<S>(at.bytes(0, 1) + 32 * b, at.w.depth, at.more, tile.codes + 8 * b);
      for (int i = 0; i < 8; i++) tile.codes[8 * b + i] ^= 0x80808080u;
    }
    scales_d(at, 1, tile);
  }
};

template <class S>
struct Decoder<S, Format::q4_0> {  // codes, d
  static constexpr int weights = 32, zero = 8;
  static constexpr bool low = false;
  static void decode(const Window& at, Tile<S>& tile) {
    nibbles(at, 0, tile);
    scales_d(at, 1, tile);
  }
};

template <class S>
struct Decoder<S, Format::mxfp4> {  // codes, e
  static constexpr int weights = 32, zero = 12;
  static constexpr bool low = false;
  static void decode(const Window& at, Tile<S>& tile) {
    // 12 + v: twice e2m1's value, and negative from code 8 on.
    alignas(16) static const uint8_t kValues[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    nibbles(at, 0, tile);
    for (int i = 0; i < at.weights / 4; i++) tile.codes[i] = S::lookup(kValues, tile.codes[i]);
    for (int b = 0; b < at.weights / kBlock; b++) {
      const auto e = __builtin_convertvector(load<S>(at.column<uint8_t>(1, 32, b)), typename S::U32);
      // 2^(e - 128) by its bits, subnormal below e = 2.
      const typename S::U32 bits = e < 2u ? (e + 1u) << 21 : (e - 1u) << 23;
      memcpy(&tile.scale[b], &bits, sizeof bits);
    }
  }
};

}  // namespace
}  // namespace jmoe

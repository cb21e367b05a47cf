// Weights decoded from the planes of jmoe/formats as they lie: `lanes` rows at once, up to 256 of depth.
//
//   w = d * sc * (code - zero) - low,   0 <= code <= 255
//
// d is that of a window where the format has integers sc, else of a block; sc, and low where it has mins, are those of
// `weights` weights, 32 or 16.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace jmoe {
namespace {

// Entries of one row in a plane of columns: what lies `step` apart. A decoder has its planes' at hand: worked out anew at
// every block, their addresses are a tenth of AVX2's instructions.
template <class T>
struct Entries {
  const T* first;
  int64_t step;
  const T* operator[](int64_t i) const { return first + i * step; }
};

// A window of a projection: `lanes` rows of one expert from `row`, `weights` of depth from `depth`.
struct Window {
  const Projection& w;
  int64_t expert, row, depth, weights;

  // A plane that holds a row's bytes together, `Per` weights a byte.
  template <int Per>
  const uint8_t* bytes(int plane) const {
    return w.planes[plane] + over<Per>((expert * w.outputs + row) * w.depth + depth);
  }
  // A plane with the rows' entries side by side, one for `Per` weights; entry 0 is this window's first.
  template <class T, int Per>
  Entries<T> column(int plane) const {
    const int64_t at = (expert * over<Per>(w.depth) + over<Per>(depth)) * w.outputs + row;
    return {reinterpret_cast<const T*>(w.planes[plane]) + at, w.outputs};
  }
  // Unsigned: a shift. Nothing here is negative.
  template <int Per>
  static int64_t over(uint64_t weights) {
    return static_cast<int64_t>(weights / Per);
  }
};

template <class S>
inline typename S::F32 to_f32(typename S::I32 integers) {
  return __builtin_convertvector(integers, typename S::F32);
}

// To the left where `right` is negative.
template <class U32>
[[gnu::always_inline]] inline U32 shift_right(U32 words, int right) {
  return right > 0 ? words >> right : words << -right;
}

// Vectors of 32 bytes of each row, and rows that they are of.
template <class S>
constexpr int kVectors = S::by_rows ? 2 : 8;
template <class S>
constexpr int kRows = S::by_rows ? kVectors<S> : S::lanes;

// out[i] = bytes 4 i .. 4 i + 3 of each of `lanes` rows; or where S takes them by rows, two at a time, out[r] = the 32
// bytes of row r. What is made of bytes one by one is then made of either. The rows' next lines are fetched too: on the
// way from the second-level cache they would queue behind the lines that Ahead has under way.
template <class S>
inline void transpose32(const uint8_t* from, int64_t stride, typename S::U32* out) {
  if ((uintptr_t)from % 64 == 0)
    for (int r = 0; r < kRows<S>; r++) __builtin_prefetch(from + r * stride + 64);
  if constexpr (S::by_rows)
    for (int r = 0; r < kRows<S>; r++) memcpy(out + r, from + r * stride, sizeof *out);
  else
    S::transpose(from, stride, out);
}

// The same of 4 words.
template <class S>
inline void transpose16(const uint8_t* from, int64_t stride, typename S::U32* out) {
  for (int i = 0; i < 4; i++)
    for (int r = 0; r < S::lanes; r++) {
      uint32_t word;
      memcpy(&word, from + r * stride + 4 * i, 4);
      out[i][r] = word;
    }
}

// 4-bit codes of `Blocks` blocks, still packed, as bytes of four weights: 32 bytes of a row hold weight j in the low and
// j + 32 in the high nibble. An odd last block (Blocks 1) has 16 bytes, of i and i + 16.
template <class S, int Blocks>
struct Nibbles {
  static constexpr int count = kVectors<S> * Blocks / 2;
  typename S::U32 words[count];
  Nibbles() = default;
  Nibbles(const uint8_t* from, int64_t stride) {
    if constexpr (Blocks == 2)
      transpose32<S>(from, stride, words);
    else
      transpose16<S>(from, stride, words);
  }
  void codes(typename S::U32* out) const {
    for (int i = 0; i < count; i++) {
      out[i] = words[i] & 0x0f0f0f0fu;
      out[count + i] = (words[i] >> 4) & 0x0f0f0f0fu;
    }
  }
  // Even and odd codes in 16 bits, of the first block and then, times 16 since they stay where they are, of the second.
  void words_of_16(typename S::U32* even, typename S::U32* odd) const {
    for (int i = 0; i < count; i++) {
      const typename S::U32 upper = S::odd(words[i]);
      even[i] = words[i] & 0x000f000fu;
      even[count + i] = words[i] & 0x00f000f0u;
      odd[i] = upper & 0x000f000fu;
      odd[count + i] = upper & 0x00f000f0u;
    }
  }
};

// Decoders without 4-bit codes load nothing early.
struct Nothing {};
struct LoadsNothing {
  static constexpr bool is_plain = false;
  template <int Blocks>
  Nothing load(int64_t, int64_t = 0) const {
    return {};
  }
};

// Of a window whose plane 0 holds 4-bit codes.
template <class S>
struct LoadsNibbles {
  static constexpr bool is_plain = false;  // whether they are codes as they are
  const uint8_t* from;
  int64_t stride;
  explicit LoadsNibbles(const Window& at) : from(at.bytes<2>(0)), stride(at.w.depth / 2) {}
  template <int Blocks>
  Nibbles<S, Blocks> load(int64_t d, int64_t row = 0) const {
    return {from + row * stride + d / 2, stride};
  }
  template <int Blocks>
  void codes(const Nibbles<S, Blocks>& packed, int64_t, int64_t, typename S::U32* out) const {
    packed.codes(out);
  }
};

// 2-bit codes of 128 weights, as bytes of four: bits 2 b, 2 b + 1 of byte j are weight j of sub-block b. `d` ascends.
template <class S>
struct Crumbs {
  const uint8_t* from;
  int64_t stride;
  typename S::U32 packed[kVectors<S>];
  Crumbs(const uint8_t* from, int64_t stride) : from(from), stride(stride) {}
  // Times 2^To.
  template <int Blocks, int To = 0>
  void codes(int64_t d, int64_t row, typename S::U32* out) {
    constexpr int vectors = kVectors<S>;
    // Shifts by constants: those by a variable are twice the work on x86.
    const auto take = [&](auto from) {
      for (int i = 0; i < vectors * Blocks; i++) {
        out[i] = shift_right(packed[i % vectors], from + i / vectors * 2 - To) & (0x03030303u << To);
      }
    };
    if (S::by_rows || d % 128 == 0) transpose32<S>(from + row * stride + d / 128 * 32, stride, packed);
    if (d % 128 == 0) {
      take(std::integral_constant<int, 0>{});
    } else {
      take(std::integral_constant<int, 4>{});
    }
  }
};

// Single bits of 256 weights: bit b of byte j is weight j of sub-block b.
template <class S>
struct Eighths {
  const uint8_t* from;
  int64_t stride;
  typename S::U32 packed[kVectors<S>];
  Eighths(const uint8_t* from, int64_t stride) : from(from), stride(stride) {
    if constexpr (!S::by_rows) transpose32<S>(from, stride, packed);
  }
  // codes |= bit << To
  template <int Blocks, int To>
  void add(int64_t d, int64_t row, typename S::U32* codes) {
    constexpr int vectors = kVectors<S>;
    if constexpr (!S::by_rows) {
      for (int i = 0; i < vectors * Blocks; i++)
        codes[i] |= ((packed[i % vectors] >> (d / 32 + i / vectors)) & 0x01010101u) << To;
      return;
    }
    transpose32<S>(from + row * stride, stride, packed);
    // Here too constants are better. (Of eight vectors they are not: four copies of so much code cost AVX-512 10%.)
    const auto take = [&](auto first) {
      for (int i = 0; i < vectors * Blocks; i++) {
        codes[i] |= shift_right(packed[i % vectors], first + i / vectors - To) & (0x01010101u << To);
      }
    };
    switch (d / 64) {
      case 0: return take(std::integral_constant<int, 0>{});
      case 1: return take(std::integral_constant<int, 2>{});
      case 2: return take(std::integral_constant<int, 4>{});
      default: return take(std::integral_constant<int, 6>{});
    }
  }
};

// Fifth bits, a word for 32 weights: bit i is weight i's.
template <class S, int Blocks>
inline void add_fifth_bits(Entries<uint32_t> bits, int64_t d, int64_t row, typename S::U32* codes) {
  for (int b = 0; b < Blocks; b++) {
    const uint32_t* high = bits[d / 32 + b];
    if constexpr (S::by_rows) {
      for (int r = 0; r < kRows<S>; r++) codes[kRows<S> * b + r] |= S::bytes_of_bits(high[row + r]) & 0x10101010u;
    } else {
      typename S::U32 words;
      memcpy(&words, high, sizeof words);
      // Bits 0..3 to bytes 0..3: the product shifts bit j by 7 j.
      for (int i = 0; i < 8; i++) codes[8 * b + i] |= ((((words >> (4 * i)) & 15u) * 0x00204081u) & 0x01010101u) << 4;
    }
  }
}

// A decoder of a window, 2 blocks of 32 at a time, and 1 where the window's number of blocks is odd, in ascending order:
// `load` reads what is packed, and may be a window early; `codes` takes it apart. By rows, of those from `row` of the
// window on; else row is 0. sc and low by their own index, d by block.
template <class S, Format>
struct Decoder;

// d * (code - zero), one f16 d for 32 weights in plane `Plane`.
template <class S, int Zero, int Plane>
struct BlockScales {
  static constexpr int weights = kBlock, zero = Zero;
  static constexpr bool has_sc = false, has_low = false;
  Entries<uint16_t> scales;
  explicit BlockScales(const Window& at) : scales(at.column<uint16_t, 32>(Plane)) {}
  typename S::F32 d(int64_t block) const { return S::halves(scales[block]); }
};

// d * code + m: planes d, m from `Plane` on.
template <class S, int Plane>
struct BlockScalesAndMins {
  static constexpr int weights = kBlock, zero = 0;
  static constexpr bool has_sc = false, has_low = true;
  Entries<uint16_t> scales, mins;
  explicit BlockScalesAndMins(const Window& at)
      : scales(at.column<uint16_t, 32>(Plane)), mins(at.column<uint16_t, 32>(Plane + 1)) {}
  typename S::F32 d(int64_t block) const { return S::halves(scales[block]); }
  typename S::F32 low(int64_t block) const { return -S::halves(mins[block]); }
};

// d * sc * code - dmin * m: planes sc, m, d, dmin from `Plane` on.
template <class S, int Plane>
struct SuperBlockScales {
  static constexpr int weights = kBlock, zero = 0;
  static constexpr bool has_sc = true, has_low = true;
  Entries<uint8_t> scales, mins;
  typename S::F32 d_, dmin;
  explicit SuperBlockScales(const Window& at)
      : scales(at.column<uint8_t, 32>(Plane)),
        mins(at.column<uint8_t, 32>(Plane + 1)),
        d_(S::halves(at.column<uint16_t, 256>(Plane + 2)[0])),
        dmin(S::halves(at.column<uint16_t, 256>(Plane + 3)[0])) {}
  typename S::F32 d(int64_t) const { return d_; }
  typename S::I32 sc(int64_t block) const { return S::widen(scales[block]); }
  typename S::F32 low(int64_t block) const { return dmin * to_f32<S>(S::widen(mins[block])); }
};

// d * sc * (code - zero), i8 sc for `Weights` weights in plane `Plane`, d in the next.
template <class S, int Weights, int Zero, int Plane>
struct SuperBlockSignedScales {
  static constexpr int weights = Weights, zero = Zero;
  static constexpr bool has_sc = true, has_low = false;
  Entries<int8_t> scales;
  typename S::F32 d_;
  explicit SuperBlockSignedScales(const Window& at)
      : scales(at.column<int8_t, Weights>(Plane)), d_(S::halves(at.column<uint16_t, 256>(Plane + 1)[0])) {}
  typename S::F32 d(int64_t) const { return d_; }
  typename S::I32 sc(int64_t s) const { return S::widen(scales[s]); }
};

template <class S>
struct Decoder<S, Format::q4_k> : LoadsNibbles<S>, SuperBlockScales<S, 1> {
  static constexpr bool is_plain = true;
  explicit Decoder(const Window& at) : LoadsNibbles<S>(at), SuperBlockScales<S, 1>(at) {}
};

template <class S>
struct Decoder<S, Format::q5_k> : LoadsNibbles<S>, SuperBlockScales<S, 2> {
  Eighths<S> high;
  explicit Decoder(const Window& at)
      : LoadsNibbles<S>(at), SuperBlockScales<S, 2>(at), high(at.bytes<8>(1), at.w.depth / 8) {}
  template <int Blocks>
  void codes(const Nibbles<S, Blocks>& packed, int64_t d, int64_t row, typename S::U32* out) {
    packed.codes(out);
    high.template add<Blocks, 4>(d, row, out);
  }
};

template <class S>
struct Decoder<S, Format::q6_k> : LoadsNibbles<S>, SuperBlockSignedScales<S, 16, 32, 2> {  // codes, high, scales, d
  Crumbs<S> high;
  explicit Decoder(const Window& at)
      : LoadsNibbles<S>(at), SuperBlockSignedScales<S, 16, 32, 2>(at), high(at.bytes<4>(1), at.w.depth / 4) {}
  template <int Blocks>
  void codes(const Nibbles<S, Blocks>& packed, int64_t d, int64_t row, typename S::U32* out) {
    typename S::U32 upper[kVectors<S> * Blocks];
    high.template codes<Blocks, 4>(d, row, upper);
    packed.codes(out);
    for (int i = 0; i < kVectors<S> * Blocks; i++) out[i] |= upper[i];
  }
};

template <class S>
struct Decoder<S, Format::q5_0> : LoadsNibbles<S>, BlockScales<S, 16, 2> {  // codes, high, d
  Entries<uint32_t> high;
  explicit Decoder(const Window& at)
      : LoadsNibbles<S>(at), BlockScales<S, 16, 2>(at), high(at.column<uint32_t, 32>(1)) {}
  template <int Blocks>
  void codes(const Nibbles<S, Blocks>& packed, int64_t d, int64_t row, typename S::U32* out) {
    packed.codes(out);
    add_fifth_bits<S, Blocks>(high, d, row, out);
  }
};

template <class S>
struct Decoder<S, Format::q8_0> : LoadsNothing, BlockScales<S, 128, 1> {  // codes, d
  const uint8_t* from;
  int64_t stride;
  explicit Decoder(const Window& at) : BlockScales<S, 128, 1>(at), from(at.bytes<1>(0)), stride(at.w.depth) {}
  template <int Blocks>
  void codes(Nothing, int64_t d, int64_t row, typename S::U32* out) {
    constexpr int vectors = kVectors<S>;
    for (int b = 0; b < Blocks; b++) transpose32<S>(from + row * stride + d + 32 * b, stride, out + vectors * b);
    for (int i = 0; i < vectors * Blocks; i++) out[i] ^= 0x80808080u;
  }
};

template <class S>
struct Decoder<S, Format::q4_0> : LoadsNibbles<S>, BlockScales<S, 8, 1> {  // codes, d
  static constexpr bool is_plain = true;
  explicit Decoder(const Window& at) : LoadsNibbles<S>(at), BlockScales<S, 8, 1>(at) {}
};

template <class S>
struct Decoder<S, Format::mxfp4> : LoadsNibbles<S> {  // codes, e
  static constexpr int weights = kBlock, zero = 12;
  static constexpr bool has_sc = false, has_low = false;
  Entries<uint8_t> exponents;
  explicit Decoder(const Window& at) : LoadsNibbles<S>(at), exponents(at.column<uint8_t, 32>(1)) {}
  // 2^(e - 128) by its bits, subnormal below e = 2.
  typename S::F32 d(int64_t block) const {
    const auto e = (typename S::U32)S::widen(exponents[block]);
    const typename S::U32 bits = e < 2u ? (e + 1u) << 21 : (e - 1u) << 23;
    return (typename S::F32)bits;
  }
  template <int Blocks>
  void codes(const Nibbles<S, Blocks>& packed, int64_t, int64_t, typename S::U32* out) {
    // 12 + v: twice e2m1's value, and negative from code 8 on.
    alignas(16) static constexpr uint8_t kValues[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    packed.codes(out);
    for (int i = 0; i < kVectors<S> * Blocks; i++) out[i] = S::lookup(kValues, out[i]);
  }
};

template <class S>
struct Decoder<S, Format::q3_k> : LoadsNothing, SuperBlockSignedScales<S, 16, 4, 2> {  // codes, high, scales, d
  Crumbs<S> low_bits;
  Eighths<S> high;
  explicit Decoder(const Window& at)
      : SuperBlockSignedScales<S, 16, 4, 2>(at),
        low_bits(at.bytes<4>(0), at.w.depth / 4),
        high(at.bytes<8>(1), at.w.depth / 8) {}
  template <int Blocks>
  void codes(Nothing, int64_t d, int64_t row, typename S::U32* out) {
    low_bits.template codes<Blocks>(d, row, out);
    high.template add<Blocks, 2>(d, row, out);
  }
};

template <class S>
struct Decoder<S, Format::q2_k> : LoadsNothing {  // codes, scales and mins, d, dmin
  static constexpr int weights = 16, zero = 0;
  static constexpr bool has_sc = true, has_low = true;
  Entries<uint8_t> both_;
  typename S::F32 d_, dmin;
  Crumbs<S> all_bits;
  explicit Decoder(const Window& at)
      : both_(at.column<uint8_t, 16>(1)),
        d_(S::halves(at.column<uint16_t, 256>(2)[0])),
        dmin(S::halves(at.column<uint16_t, 256>(3)[0])),
        all_bits(at.bytes<4>(0), at.w.depth / 4) {}
  typename S::I32 both(int64_t s) const { return S::widen(both_[s]); }
  typename S::F32 d(int64_t) const { return d_; }
  typename S::I32 sc(int64_t s) const { return both(s) & 15; }
  typename S::F32 low(int64_t s) const { return dmin * to_f32<S>(both(s) >> 4); }
  template <int Blocks>
  void codes(Nothing, int64_t d, int64_t row, typename S::U32* out) {
    all_bits.template codes<Blocks>(d, row, out);
  }
};

template <class S>
struct Decoder<S, Format::q5_1> : LoadsNibbles<S>, BlockScalesAndMins<S, 2> {  // codes, high, d, m
  Entries<uint32_t> high;
  explicit Decoder(const Window& at)
      : LoadsNibbles<S>(at), BlockScalesAndMins<S, 2>(at), high(at.column<uint32_t, 32>(1)) {}
  template <int Blocks>
  void codes(const Nibbles<S, Blocks>& packed, int64_t d, int64_t row, typename S::U32* out) {
    packed.codes(out);
    add_fifth_bits<S, Blocks>(high, d, row, out);
  }
};

template <class S>
struct Decoder<S, Format::q4_1> : LoadsNibbles<S>, BlockScalesAndMins<S, 1> {  // codes, d, m
  static constexpr bool is_plain = true;
  explicit Decoder(const Window& at) : LoadsNibbles<S>(at), BlockScalesAndMins<S, 1>(at) {}
};

// 127 + v, looked up by 4-bit codes.
template <class S>
struct LoadsIq4 : LoadsNibbles<S> {
  using LoadsNibbles<S>::LoadsNibbles;
  template <int Blocks>
  void codes(const Nibbles<S, Blocks>& packed, int64_t, int64_t, typename S::U32* out) const {
    alignas(16) static constexpr uint8_t kValues[16] = {0,   23,  44,  62,  78,  92,  105, 117,
                                                        128, 140, 152, 165, 180, 196, 216, 240};
    packed.codes(out);
    for (int i = 0; i < kVectors<S> * Blocks; i++) out[i] = S::lookup(kValues, out[i]);
  }
};

template <class S>
struct Decoder<S, Format::iq4_nl> : LoadsIq4<S>, BlockScales<S, 127, 1> {  // codes, d
  explicit Decoder(const Window& at) : LoadsIq4<S>(at), BlockScales<S, 127, 1>(at) {}
};

template <class S>
struct Decoder<S, Format::iq4_xs> : LoadsIq4<S>, SuperBlockSignedScales<S, 32, 127, 1> {  // codes, scales, d
  explicit Decoder(const Window& at) : LoadsIq4<S>(at), SuperBlockSignedScales<S, 32, 127, 1>(at) {}
};

}  // namespace
}  // namespace jmoe

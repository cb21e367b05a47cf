// AVX2: 8 rows, codes or weights as 16-bit integers times those of x by vpmaddwd.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace jmoe {
namespace {

struct Simd {
  static constexpr const char* name = "avx2";
  static constexpr int lanes = 8, columns = 4, bias = 0;
  typedef uint32_t U32 __attribute__((vector_size(32)));
  typedef int32_t I32 __attribute__((vector_size(32)));
  typedef float F32 __attribute__((vector_size(32)));

  static constexpr int few_columns = 5;   // up to so many, weights are decoded on the way and no tile is made
  static constexpr int words_from = 6;    // columns from which on weights become 16-bit integers
  static constexpr int word_columns = 8;  // of these at a time
  static constexpr bool is_halved(int) { return false; }
  static constexpr bool two_bytes = false, by_rows = false;
  static void dot(I32& sum, U32 codes, const uint8_t* ints, int i) {
    sum = (I32)dot_word(dot_word((U32)sum, even(codes), ints + 4 * i), odd(codes), ints + 32 + 4 * i);
  }

  // Products of 16-bit integers, two a lane.
  static void dot_words(U32& sum, U32 a, U32 b) { sum += (U32)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
  // With a word of x in all lanes. Written out: GCC makes all products before it adds any, and stores them meanwhile.
  static U32 dot_word(U32 sum, U32 a, const uint8_t* x) {
    U32 product;
    asm("vpbroadcastd %3, %1\n\tvpmaddwd %2, %1, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sum), "=&x"(product)
        : "x"(a), "m"(*(const int32_t*)x));
    return sum;
  }
  static U32 multiply_bytes(U32 a, U32 b) { return (U32)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
  static U32 add_words(U32 a, U32 b) { return (U32)_mm256_add_epi16((__m256i)a, (__m256i)b); }
  static U32 subtract_words(U32 a, U32 b) { return (U32)_mm256_sub_epi16((__m256i)a, (__m256i)b); }
  static U32 words(const uint8_t* x) {
    int32_t w;
    memcpy(&w, x, 4);
    return (U32)_mm256_set1_epi32(w);
  }

  static constexpr int packed = 32;
  // Of each four of 32 integers 0 and 2, then 1 and 3.
  static void pack_pairs(const int32_t* v, uint8_t* out) {
    int16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = (int16_t)v[i / 4 * 4 + i % 2 * 2 + i / 2 % 2];
    memcpy(out, order, sizeof order);
  }
  // Of 32 integers the even ones, then the odd ones.
  static void pack(const int32_t* v, uint8_t* out) {
    int16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = (int16_t)v[i % 16 * 2 + i / 16];
    memcpy(out, order, sizeof order);
  }

  static U32 lookup(const uint8_t* table, U32 index) {
    return (U32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table)), (__m256i)index);
  }
  static F32 halves(const uint16_t* from) { return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }

  static I32 widen(const uint8_t* from) { return (I32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
  static I32 widen(const int8_t* from) { return (I32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)); }

  // out[i] = bytes 4 i .. 4 i + 3 of each of 8 rows.
  static void transpose(const uint8_t* from, int64_t stride, U32* out) {
    __m256i a[8], b[8];
    for (int r = 0; r < 8; r++, from += stride) a[r] = _mm256_loadu_si256((const __m256i*)from);
    for (int r = 0; r < 8; r += 2) {
      b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
      b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
      a[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
      a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
      a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
      a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
    for (int i = 0; i < 4; i++) {
      out[i] = (U32)_mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
      out[i + 4] = (U32)_mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    }
  }

  static U32 even(U32 bytes) { return bytes & 0x00ff00ffu; }
  static U32 odd(U32 bytes) { return (U32)_mm256_srli_epi16((__m256i)bytes, 8); }

  struct FewColumns;
};

// For few columns of x a vector is 32 codes of one row: sums are transposed in the place of codes, and a block of x is
// read once for all rows, where each four of it were broadcast. A block's sum is an integer either way, so bits are the
// same.
struct Simd::FewColumns : Simd {
  static constexpr bool by_rows = true;
  // Of a row's codes with a block of integers: sums of four neighbours.
  static I32 dot_row(U32 even, U32 odd, const uint8_t* ints) {
    const __m256i* x = (const __m256i*)ints;
    return (I32)_mm256_madd_epi16((__m256i)even, _mm256_loadu_si256(x)) +
           (I32)_mm256_madd_epi16((__m256i)odd, _mm256_loadu_si256(x + 1));
  }
  // In each half of the register: the sums of two rows, then those of four. (vphaddd is slower than what it is made of.)
  static I32 add_up_two(I32 a, I32 b) {
    return (I32)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b) + (I32)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
  }
  static I32 add_up_four(I32 a, I32 b) {
    return (I32)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b) + (I32)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
  }
  // Of eight rows, from those of four and four more: the first half's sums, or the second's.
  static I32 first_half(I32 a, I32 b) { return (I32)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x20); }
  static I32 second_half(I32 a, I32 b) { return (I32)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x31); }
  // Bit j of a word fills byte j.
  static U32 bytes_of_bits(uint32_t word) {
    const __m256i each = _mm256_shuffle_epi8(
        _mm256_set1_epi32((int)word), _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0));
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    return (U32)_mm256_cmpeq_epi8(_mm256_and_si256(each, bit), bit);
  }
};

}  // namespace
}  // namespace jmoe

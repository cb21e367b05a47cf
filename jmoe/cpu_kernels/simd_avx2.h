// AVX2: 8 rows, codes times the two bytes of an integer by vpmaddubsw, or weights as 16-bit integers by vpmaddwd.
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

  static constexpr int words_from = 4;    // columns from which on weights become 16-bit integers
  static constexpr int word_columns = 8;  // of these at a time
  static constexpr bool is_halved(int) { return false; }
  static constexpr bool two_bytes = false, sums_words = true;
  static constexpr bool loads_early = false;  // sixteen registers are too few
  // Codes times integers of 16 bits.
  static void dot(I32& sum, U32 codes, const uint8_t* x) {
    const U32 even = codes & 0x00ff00ffu, odd = (U32)_mm256_srli_epi16((__m256i)codes, 8);
    sum = (I32)dot_word(dot_word((U32)sum, even, x), odd, x + 4);
  }
  // Codes of up to six bits times bytes of integers, neighbours added, in 16 bits.
  static void dot_bytes(U32& sum, U32 codes, const uint8_t* x) {
    sum = add_words(sum, multiply_bytes(codes, words(x)));
  }
  // Of such sums, high bytes' and low ones'.
  static I32 join(U32 high, U32 low) {
    return (I32)_mm256_madd_epi16((__m256i)high, _mm256_set1_epi16(256)) +
           (I32)_mm256_madd_epi16((__m256i)low, _mm256_set1_epi16(1));
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

  static constexpr int packed = 4;
  // Of four integers 0 and 2, then 1 and 3.
  static void pack_pairs(const int32_t* v, uint8_t* out) {
    const int16_t order[4] = {(int16_t)v[0], (int16_t)v[2], (int16_t)v[1], (int16_t)v[3]};
    memcpy(out, order, 8);
  }
  // Of four integers the high bytes, then the low ones; v = 256 high + low.
  static void pack(const int32_t* v, uint8_t* out) {
    for (int i = 0; i < 4; i++) {
      out[i] = (uint8_t)((v[i] + 128) >> 8);
      out[4 + i] = (uint8_t)v[i];
    }
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
};

}  // namespace
}  // namespace jmoe

// AVX-512 with VNNI: 16 rows, u8 codes times the two signed bytes of an integer by vpdpbusd.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace jmoe {
namespace {

struct Simd {
  static constexpr const char* name = "avx512vnni";
  static constexpr int lanes = 16, columns = 8, bias = 0;
  typedef uint32_t U32 __attribute__((vector_size(64)));
  typedef int32_t I32 __attribute__((vector_size(64)));
  typedef float F32 __attribute__((vector_size(64)));

  static constexpr int few_columns = 3;    // up to so many, weights are decoded on the way and no tile is made
  static constexpr int words_from = 9;     // columns from which on weights become 16-bit integers
  static constexpr int word_columns = 12;  // of these at a time
  static constexpr bool is_halved(int) { return false; }
  static constexpr bool two_bytes = true, by_rows = false;
  using FewColumns = Simd;
  static void dot(I32& sum, U32 codes, const uint8_t* ints, int i) {
    sum = (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, word(ints + 8 * i));
  }

  // Products of 16-bit integers, two a lane.
  static void dot_words(U32& sum, U32 a, U32 b) {
    sum = (U32)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
  }
  // With a word of x in all lanes. Written out: compilers load it first, and the instructions are what is short.
  // By value: through a reference GCC may store every sum after every product, which takes twice as long.
  static U32 dot_word(U32 sum, U32 a, const uint8_t* x) {
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*(const int32_t*)x));
    return sum;
  }
  // Unsigned bytes times signed ones, neighbours added, in 16 bits.
  static U32 multiply_bytes(U32 a, U32 b) { return (U32)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
  static U32 add_words(U32 a, U32 b) { return (U32)_mm512_add_epi16((__m512i)a, (__m512i)b); }
  static U32 subtract_words(U32 a, U32 b) { return (U32)_mm512_sub_epi16((__m512i)a, (__m512i)b); }
  static U32 words(const uint8_t* x) { return (U32)word(x); }

  // Of each four of 16 integers the even ones, then the odd ones.
  static void pack_pairs(const int32_t* v, uint8_t* out) {
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    const __m256i integers = _mm512_cvtepi32_epi16(_mm512_loadu_si512(v));
    _mm256_storeu_si256((__m256i*)out, _mm256_shuffle_epi8(integers, _mm256_broadcastsi128_si256(order)));
  }

  // Of each four of 16 integers their high bytes, then their low ones; v = 256 high + low.
  static constexpr int packed = 16;
  static void pack(const int32_t* v, uint8_t* out) {
    const __m512i integers = _mm512_loadu_si512(v);
    const __m512i rounded = _mm512_srai_epi32(_mm512_add_epi32(integers, _mm512_set1_epi32(128)), 8);
    const __m128i high = _mm512_cvtepi32_epi8(rounded), low = _mm512_cvtepi32_epi8(integers);
    _mm_storeu_si128((__m128i*)out, _mm_unpacklo_epi32(high, low));
    _mm_storeu_si128((__m128i*)(out + 16), _mm_unpackhi_epi32(high, low));
  }

  static U32 lookup(const uint8_t* table, U32 index) {
    return (U32)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), (__m512i)index);
  }
  static F32 halves(const uint16_t* from) { return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }

  static I32 widen(const uint8_t* from) { return (I32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)); }
  static I32 widen(const int8_t* from) { return (I32)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)); }

  // out[i] = bytes 4 i .. 4 i + 3 of each of 16 rows.
  static void transpose(const uint8_t* from, int64_t stride, U32* out) {
    __m512i a[8], b[8];
    const uint8_t* below = from + 8 * stride;
    for (int r = 0; r < 8; r++, from += stride, below += stride) {
      const __m512i top = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
      a[r] = _mm512_inserti64x4(top, _mm256_loadu_si256((const __m256i*)below), 1);
    }
    for (int r = 0; r < 8; r += 2) {
      b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
      b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
      a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
      a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
      a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
      a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int i = 0; i < 4; i++) {
      out[i] = (U32)_mm512_permutex2var_epi64(a[i], first, a[i + 4]);
      out[i + 4] = (U32)_mm512_permutex2var_epi64(a[i], second, a[i + 4]);
    }
  }

 private:
  static __m512i word(const uint8_t* x) {
    int32_t w;
    memcpy(&w, x, 4);
    return _mm512_set1_epi32(w);
  }
};

}  // namespace
}  // namespace jmoe

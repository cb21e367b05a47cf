// AVX2: 8 rows, codes widened to 16 bits times the integers themselves by vpmaddwd.
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

  static constexpr int words_from = kUnitColumns + 1;
  static constexpr bool two_bytes = false;
  static void dot(I32& sum, U32 codes, const uint8_t* x) {
    const __m256i even = (__m256i)(codes & 0x00ff00ffu), odd = _mm256_srli_epi16((__m256i)codes, 8);
    sum += (I32)_mm256_madd_epi16(even, word(x));
    sum += (I32)_mm256_madd_epi16(odd, word(x + 4));
  }

  // Four integers of 16 bits in the order 0, 2, 1, 3: even bytes' partners, then odd ones'.
  static constexpr int packed = 4;
  static void pack(const int32_t* v, uint8_t* out) {
    const int16_t order[4] = {(int16_t)v[0], (int16_t)v[2], (int16_t)v[1], (int16_t)v[3]};
    memcpy(out, order, 8);
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

 private:
  static __m256i word(const uint8_t* x) {
    int32_t w;
    memcpy(&w, x, 4);
    return _mm256_set1_epi32(w);
  }
};

}  // namespace
}  // namespace jmoe

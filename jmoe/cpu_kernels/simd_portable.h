// Any processor: 4 rows in the compiler's own vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace jmoe {
namespace {

struct Simd {
  static constexpr const char* name = "portable";
  static constexpr int lanes = 4, columns = 4, bias = 0;
  typedef uint32_t U32 __attribute__((vector_size(16)));
  typedef int32_t I32 __attribute__((vector_size(16)));
  typedef float F32 __attribute__((vector_size(16)));
  typedef uint16_t U16 __attribute__((vector_size(8)));

  static constexpr int few_columns = 3, words_from = kUnitColumns + 1;
  static constexpr bool two_bytes = false, by_rows = false;
  using FewColumns = Simd;
  static void dot(I32& sum, U32 codes, const uint8_t* ints, int i) {
    int16_t v[4];
    memcpy(v, ints + 8 * i, 8);
    for (int j = 0; j < 4; j++) sum += (I32)((codes >> (8 * j)) & 255u) * (int32_t)v[j];
  }

  static constexpr int packed = 4;
  static void pack(const int32_t* v, uint8_t* out) {
    for (int i = 0; i < 4; i++) {
      const int16_t narrow = (int16_t)v[i];
      memcpy(out + 2 * i, &narrow, 2);
    }
  }

  static U32 lookup(const uint8_t* table, U32 index) {
    uint8_t bytes[sizeof index];
    memcpy(bytes, &index, sizeof index);
    for (uint8_t& byte : bytes) byte = table[byte];
    memcpy(&index, bytes, sizeof index);
    return index;
  }

  static F32 halves(const uint16_t* from) {
    U16 narrow;
    memcpy(&narrow, from, sizeof narrow);
    const U32 half = __builtin_convertvector(narrow, U32), sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    // Subnormals are integers times 2^-24.
    const F32 small = __builtin_convertvector((I32)rest, F32) * 0x1p-24f;
    const U32 tiny = (U32)small, normal = (rest << 13) + (112u << 23), special = (rest << 13) | 0x7f800000u;
    return (F32)(sign | (rest < 0x0400u ? tiny : rest >= 0x7c00u ? special : normal));
  }

  template <class T>
  static I32 widen(const T* from) {
    return I32{from[0], from[1], from[2], from[3]};
  }

  static void transpose(const uint8_t* from, int64_t stride, U32* out) {
    for (int i = 0; i < 8; i++)
      for (int r = 0; r < lanes; r++) {
        uint32_t word;
        memcpy(&word, from + r * stride + 4 * i, 4);
        out[i][r] = word;
      }
  }
};

}  // namespace
}  // namespace jmoe

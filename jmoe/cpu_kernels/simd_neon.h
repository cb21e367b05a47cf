// NEON with the dot product of ARMv8.2: 4 rows, codes times the two signed bytes of an integer by sdot.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace jmoe {
namespace {

struct Simd {
  static constexpr const char* name = "neon";
  static constexpr int lanes = 4, columns = 4;
  // sdot takes signed bytes: 128 less than the codes.
  static constexpr int bias = 128;
  typedef uint32_t U32 __attribute__((vector_size(16)));
  typedef int32_t I32 __attribute__((vector_size(16)));
  typedef float F32 __attribute__((vector_size(16)));

  static constexpr int few_columns = 3, words_from = kUnitColumns + 1;
  static constexpr bool two_bytes = true, by_rows = false;
  using FewColumns = Simd;
  static void dot(I32& sum, U32 codes, const uint8_t* ints, int i) {
    sum = (I32)vdotq_s32((int32x4_t)sum, (int8x16_t)(codes ^ 0x80808080u), word(ints + 8 * i));
  }

  // Four integers: their high bytes, then their low ones; v = 256 high + low.
  static constexpr int packed = 4;
  static void pack(const int32_t* v, uint8_t* out) {
    for (int i = 0; i < 4; i++) {
      out[i] = (uint8_t)((v[i] + 128) >> 8);
      out[4 + i] = (uint8_t)v[i];
    }
  }

  static U32 lookup(const uint8_t* table, U32 index) { return (U32)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)index); }
  static F32 halves(const uint16_t* from) { return (F32)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
  static I32 widen(const uint8_t* from) { return I32{from[0], from[1], from[2], from[3]}; }
  static I32 widen(const int8_t* from) { return I32{from[0], from[1], from[2], from[3]}; }

  // out[i] = bytes 4 i .. 4 i + 3 of each of 4 rows.
  static void transpose(const uint8_t* from, int64_t stride, U32* out) {
    for (int half = 0; half < 2; half++, from += 16, out += 4) {
      uint32x4_t a[4];
      for (int r = 0; r < 4; r++) a[r] = vreinterpretq_u32_u8(vld1q_u8(from + r * stride));
      const uint64x2_t b[4] = {
          vreinterpretq_u64_u32(vtrn1q_u32(a[0], a[1])), vreinterpretq_u64_u32(vtrn2q_u32(a[0], a[1])),
          vreinterpretq_u64_u32(vtrn1q_u32(a[2], a[3])), vreinterpretq_u64_u32(vtrn2q_u32(a[2], a[3]))};
      out[0] = (U32)vtrn1q_u64(b[0], b[2]);
      out[1] = (U32)vtrn1q_u64(b[1], b[3]);
      out[2] = (U32)vtrn2q_u64(b[0], b[2]);
      out[3] = (U32)vtrn2q_u64(b[1], b[3]);
    }
  }

 private:
  static int8x16_t word(const uint8_t* x) {
    int32_t w;
    memcpy(&w, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(w));
  }
};

}  // namespace
}  // namespace jmoe

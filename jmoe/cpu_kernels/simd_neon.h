// NEON with the dot product of ARMv8.2: 4 rows, codes times the two signed bytes of an integer by sdot.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace jmoe {
namespace {

struct Simd {
  static constexpr const char* name = "neon";
  static constexpr int lanes = 4, columns = 4;
  typedef uint32_t U32 __attribute__((vector_size(16)));
  typedef int32_t I32 __attribute__((vector_size(16)));
  typedef float F32 __attribute__((vector_size(16)));

  struct Sum {
    int32x4_t high, low;
  };
  static Sum start(int32_t first) { return {vdupq_n_s32(0), vdupq_n_s32(first)}; }
  // sdot takes signed bytes, and Q8_0's codes reach 255: the low seven bits, and twice 64 where bit 7 is set.
  static void dot(Sum& sum, U32 codes, const uint8_t* x) {
    const int8x16_t high = word(x), low = word(x + 4), q = vreinterpretq_s8_u32((uint32x4_t)(codes & 0x7f7f7f7fu));
    sum.high = vdotq_s32(sum.high, q, high);
    sum.low = vdotq_s32(sum.low, q, low);
  }
  static I32 finish(const Sum& sum) { return (I32)vaddq_s32(vshlq_n_s32(sum.high, 8), sum.low); }
};

}  // namespace
}  // namespace jmoe

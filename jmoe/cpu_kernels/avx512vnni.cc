#if defined(__x86_64__)

#include "simd_avx512vnni.h"

#include "layer.h"

namespace jmoe {
namespace {

// For processors that add on more pipes than they multiply on.
struct Halving : Simd {
  static constexpr const char* name = "avx512vnni-halved";
  static constexpr int word_columns = 8;
  // Not all, so that multipliers and adders are equally busy.
  static constexpr bool is_halved(int group) { return group % 4 != 1; }
};

}  // namespace
}  // namespace jmoe

const jmoe::Kernels jmoe::kAvx512Vnni = jmoe::kernels<jmoe::Simd>();
const jmoe::Kernels jmoe::kAvx512VnniHalved = jmoe::kernels<jmoe::Halving>();

#endif

#if defined(__x86_64__)

#include "simd_avx2.h"

#include "layer.h"

const jmoe::Kernels jmoe::kAvx2 = jmoe::kernels<jmoe::Simd>();

#endif

#if defined(__aarch64__)

#include "simd_neon.h"

#include "layer.h"

const jmoe::Kernels jmoe::kNeon = jmoe::kernels<jmoe::Simd>();

#endif

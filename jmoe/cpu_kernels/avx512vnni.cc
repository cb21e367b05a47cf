#if defined(__x86_64__)

#include "simd_avx512vnni.h"

#include "layer.h"

const jmoe::Kernels jmoe::kAvx512Vnni = jmoe::kernels<jmoe::Simd>();

#endif

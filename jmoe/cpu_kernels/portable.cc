#include "simd_portable.h"

#include "layer.h"

const jmoe::Kernels jmoe::kPortable = jmoe::kernels<jmoe::Simd>();

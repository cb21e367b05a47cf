#include "kernels.h"

namespace jmoe {

const FormatLayout kLayouts[kFormats] = {
    // codes, scales, mins, d, dmin
    {"q4_k", 256, 5, {{1, 2, true}, {1, 32, false}, {1, 32, false}, {2, 256, false}, {2, 256, false}}},
    // codes, high, scales, mins, d, dmin
    {"q5_k", 256, 6, {{1, 2, true}, {1, 8, true}, {1, 32, false}, {1, 32, false}, {2, 256, false}, {2, 256, false}}},
    // codes, high, scales, d
    {"q6_k", 256, 4, {{1, 2, true}, {1, 4, true}, {1, 16, false}, {2, 256, false}}},
    // codes, high, d
    {"q5_0", 32, 3, {{1, 2, true}, {4, 32, false}, {2, 32, false}}},
    // codes, d
    {"q8_0", 32, 2, {{1, 1, true}, {2, 32, false}}},
    // codes, d
    {"q4_0", 32, 2, {{1, 2, true}, {2, 32, false}}},
    // codes, e
    {"mxfp4", 32, 2, {{1, 2, true}, {1, 32, false}}},
    // codes, high, scales, d
    {"q3_k", 256, 4, {{1, 4, true}, {1, 8, true}, {1, 16, false}, {2, 256, false}}},
    // codes, scales and mins, d, dmin
    {"q2_k", 256, 4, {{1, 4, true}, {1, 16, false}, {2, 256, false}, {2, 256, false}}},
    // codes, high, d, m
    {"q5_1", 32, 4, {{1, 2, true}, {4, 32, false}, {2, 32, false}, {2, 32, false}}},
    // codes, d, m
    {"q4_1", 32, 3, {{1, 2, true}, {2, 32, false}, {2, 32, false}}},
    // codes, d
    {"iq4_nl", 32, 2, {{1, 2, true}, {2, 32, false}}},
    // codes, scales, d
    {"iq4_xs", 256, 3, {{1, 2, true}, {1, 32, false}, {2, 256, false}}},
};

}  // namespace jmoe

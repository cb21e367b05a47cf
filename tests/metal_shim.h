// What a Metal kernel body needs to be compiled as C++: its types, its attributes, and simdgroups of 32 lanes.
//
// Each lane is a coroutine that runs until it asks for a simd_sum; when all 32 wait, they get the sum, added in pairs as
// shuffles would. A lane that returns while others wait is an error, and so is an index outside an array. This shows what
// the body computes. It says nothing of Metal's own rules: its compiler, address spaces, memory model or speed.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

using uint = unsigned int;
struct uint3 {
    uint x, y, z;
};

// IEEE binary16, for conversion only.
struct half {
    uint16_t bits;
    operator float() const {
        const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
        if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
        const uint32_t word = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }
};

template <class To, class From>
To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

[[noreturn]] inline void fail(const char* what, size_t at, size_t size) {
    std::fprintf(stderr, "%s: index %zu of %zu\n", what, at, size);
    std::exit(3);
}

// An input or output as MLX hands it over, that knows its size.
template <class T>
struct Buffer {
    const char* name;
    std::vector<T> data;
    T& operator[](size_t at) {
        if (at >= data.size()) fail(name, at, data.size());
        return data[at];
    }
};

constexpr int LANES = 32;
constexpr size_t STACK = 1 << 16;

struct Lane {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    uint3 position;
    float value;
    bool waits, done;
};

inline Lane lanes[LANES];
inline ucontext_t scheduler;
inline int running;

namespace metal {
inline float simd_sum(float value) {
    Lane& lane = lanes[running];
    lane.value = value;
    lane.waits = true;
    swapcontext(&lane.context, &scheduler);
    return lane.value;
}
}  // namespace metal

void body(uint3 thread_position_in_grid, uint thread_index_in_simdgroup);

inline void enter() {
    Lane& lane = lanes[running];
    body(lane.position, running);
    lane.done = true;
}

// One simdgroup, whose first thread stands at (x, y).
inline void run_simdgroup(uint x, uint y) {
    for (int i = 0; i < LANES; ++i) {
        Lane& lane = lanes[i];
        lane.position = {x + i, y, 0};
        lane.waits = lane.done = false;
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.data();
        lane.context.uc_stack.ss_size = STACK;
        lane.context.uc_link = &scheduler;
        makecontext(&lane.context, enter, 0);
    }
    for (;;) {
        int waiting = 0, done = 0;
        for (running = 0; running < LANES; ++running) {
            swapcontext(&scheduler, &lanes[running].context);
            waiting += lanes[running].waits;
            done += lanes[running].done;
        }
        if (done == LANES) return;
        if (waiting != LANES) fail("lanes of a simdgroup part before a simd_sum", waiting, LANES);
        float sums[LANES];
        for (int i = 0; i < LANES; ++i) sums[i] = lanes[i].value;
        for (int step = LANES / 2; step > 0; step /= 2)
            for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
        for (Lane& lane : lanes) {
            lane.value = sums[0];
            lane.waits = false;
        }
    }
}

template <class T>
Buffer<T> read(const char* name, size_t size) {
    Buffer<T> buffer{name, std::vector<T>(size)};
    if (std::fread(buffer.data.data(), sizeof(T), size, stdin) != size) fail(name, 0, size);
    return buffer;
}

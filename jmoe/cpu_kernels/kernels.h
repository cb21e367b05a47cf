// What the entry and the kernels of each instruction set share. Plain data and function pointers only: nothing here may
// be an inline function, of which a linker could keep the copy that a processor lacks the instructions for.
//
// Letters as in the README: E experts, H hidden, I intermediate, T tokens, K top_k, a projection [E, O, D]. A pair is a
// (token, slot); P pairs stand sorted by expert, and a "place" is an index into that order.
#pragma once

#include <cstdint>

namespace jmoe {

enum class Format : int32_t {
  q4_k, q5_k, q6_k, q5_0, q8_0, q4_0, mxfp4, q3_k, q2_k, q5_1, q4_1, iq4_nl, iq4_xs
};

constexpr int kFormats = 13;
constexpr int kMaxPlanes = 6;
constexpr int kBlock = 32;         // weights that share one scale of x
constexpr int kChunk = 256;        // depth that is decoded at once
constexpr int kSlab = 8 * kChunk;  // depth of which all rows of a unit are multiplied before more of it
constexpr int kMaxLanes = 16;      // rows that any instruction set multiplies at once
constexpr int kUnitRows = 64;      // most rows of a unit of work: a cache line of u8 scales
constexpr int kUnitColumns = 128;  // most columns of x that a decoded tile meets

// jmoe/formats says the same to Python.
struct PlaneLayout {
  int32_t bytes, per;  // of an entry; weights an entry
  bool by_row;         // [E, O, D / per], or [E, D / per, O]
};
struct FormatLayout {
  const char* name;
  int32_t block, planes;
  PlaneLayout plane[kMaxPlanes];
};
extern const FormatLayout kLayouts[kFormats];  // by Format

struct Projection {
  Format format;
  int64_t outputs, depth;
  const uint8_t* planes[kMaxPlanes];
};

// 32 activations as scale * integer; aligned, so that no vector of integers crosses a line.
struct alignas(32) Block {
  uint8_t ints[2 * kBlock];  // two bytes each, four integers together in the order that the instruction set wants
  float scale;               // NaN where a value is not finite
  float sums[3];             // of the values: the first and second 16, and all
  int32_t totals[3];         // the same of the integers
};

// The same for products with weights as 16-bit integers (matmul.h).
struct WordBlock {
  uint8_t pairs[2 * kBlock];  // 16 bits each; of four integers 0 and 2, then 1 and 3
  float scale;
  float sums[3];
  uint32_t products;  // sum of those of 0 and 1, 2 and 3 where they are halved, modulo 2^32
};

// x or h: values where products are exact, else blocks, as words for places whose expert has many.
struct Activations {
  int64_t depth;
  float* values;     // [N, D], N = T for x and P for h
  Block* blocks;     // [N, D/32]
  WordBlock* words;  // [D/32, P]: what meets the same weights lies together
};

// h = g * sigmoid(slope * g * (1 + cubic * g^2)) * (u + shift), g at most limit, u within +-limit; relu(u)^2 where the
// layer has no gate.
struct Activation {
  float slope, cubic, shift, limit;
};

// Bounds of a block's integers, such that 16 bits hold the sum of one and sc * (code - zero), which is 4096 at most,
// and 32 bits the block's sum of products. (Two signed bytes would hold 127 * 256 + 127.)
constexpr int32_t kLargest = 32767 - 4096;
constexpr int32_t kLargestTotal = 0x7fffffff / 4096 - kBlock;  // of the magnitudes, before they are rounded

struct Layer {
  Projection gate, up, down;
  bool has_gate, exact, weight_on_input;
  Activation activation;
  const float* gate_bias;   // f32[E, I], as the next; null where there is none
  const float* up_bias;
  const float* down_bias;   // f32[E, H]
  const float* down_scale;  // f32[E]
  int64_t top_k;
  int64_t places;         // P
  int64_t actives;        // experts that were chosen
  const int64_t* active;  // [actives] ascending
  const int64_t* starts;  // [E + 1] places of each expert
  const int32_t* pairs;   // [P] pair at each place
  const float* weights;   // f32[T, K]
  Activations x;          // [T, H]
  Activations h;          // [P, I], by place
  float* y;               // f32[T, H], zeros at first
};

// Rows of gate and up of one expert, or of down of all.
struct Unit {
  int64_t expert, row, rows;  // rows 0: none
};

struct Kernels {
  const char* name;
  void (*quantise)(const Layer&, int64_t token);
  // x as words for the places of an expert that has many.
  void (*gather)(const Layer&, int64_t expert);
  // h = act(gate x + gate_bias, up x + up_bias). The thread's next unit is fetched meanwhile.
  void (*gate_up)(const Layer&, Unit, Unit next);
  // y += weight * (down h + down_bias) * down_scale, experts ascending.
  void (*down)(const Layer&, Unit, Unit next);
};

// Of each instruction set that the compiler can make for this architecture.
extern const Kernels kPortable;
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
extern const Kernels kAvx512VnniHalved;
extern const Kernels kNeon;

}  // namespace jmoe

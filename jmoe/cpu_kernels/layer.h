// The units of work of a layer, for one instruction set.
//
//   h[p] = act(gate x[t] + gate_bias, up x[t] + up_bias)                 place p of token t
//   y[t] += weight[p] * (down h[p] + down_bias) * down_scale             experts ascending
//
// or with weight[p] on x[t]: the projections are linear, so it multiplies what they make of x.
//
// An element of y is summed in an order that depends on the routing alone: not on units, threads or other tokens.
#pragma once

#include "matmul.h"

namespace jmoe {
namespace {

// 32 values as scale * integer; the scale is NaN where one is not finite.
struct Integers {
  int32_t v[kBlock];
  float scale;
  int32_t half[2];  // sums of 16

  explicit Integers(const float* values) {
    uint32_t bits[kBlock], most = 0;
    memcpy(bits, values, sizeof bits);
    for (int i = 0; i < kBlock; i++) {
      const uint32_t magnitude = bits[i] & 0x7fffffffu;
      most = magnitude > most ? magnitude : most;
    }
    float largest;
    memcpy(&largest, &most, 4);
    const bool finite = most < 0x7f800000u;
    // Below 2^-111 a scale would be subnormal: such a block counts as zeros.
    const float inverse = finite && largest >= 0x1p-111f ? kLargest / largest : 0.0f;
    float scaled[kBlock], total[8] = {};  // eight sums side by side: one would wait for itself 32 times
    for (int i = 0; i < kBlock; i++) scaled[i] = (finite ? values[i] : 0.0f) * inverse;
    for (int i = 0; i < kBlock; i += 8)
      for (int j = 0; j < 8; j++) total[j] += __builtin_fabsf(scaled[i + j]);
    for (int n = 4; n > 0; n /= 2)
      for (int j = 0; j < n; j++) total[j] += total[j + n];
    const float less = total[0] > kLargestTotal ? kLargestTotal / total[0] : 1.0f;
    for (int i = 0; i < kBlock; i++) {
      // Adding 1.5 * 2^23 rounds to an integer, in the low bits.
      const float rounded = scaled[i] * less + 0x1.8p23f;
      memcpy(&v[i], &rounded, 4);
      v[i] -= 0x4b400000;
    }
    scale = finite ? largest / (kLargest * less) : __builtin_nanf("");
    for (int h = 0; h < 2; h++) {
      half[h] = 0;
      for (int i = 0; i < 16; i++) half[h] += v[16 * h + i];
    }
  }

  template <class Block>
  void describe(Block& to) const {
    to.scale = scale;
    to.sums[0] = scale * half[0];
    to.sums[1] = scale * half[1];
    to.sums[2] = scale * (half[0] + half[1]);
  }
};

template <class S>
void store(const Integers& from, Block& to) {
  from.describe(to);
  to.totals[0] = from.half[0];
  to.totals[1] = from.half[1];
  to.totals[2] = from.half[0] + from.half[1];
  for (int i = 0; i < kBlock; i += S::packed) S::pack(from.v + i, to.ints + 2 * i);
}

template <class S>
void store(const Integers& from, WordBlock& to) {
  from.describe(to);
  to.products = 0;
  for (int i = 0; i < kBlock; i += 2)
    if (S::is_halved(i / 4)) to.products += (uint32_t)(from.v[i] * from.v[i + 1]);
  for (int i = 0; i < kBlock; i += S::packed) S::pack_pairs(from.v + i, to.pairs + 2 * i);
}

template <class S>
void quantise(const Layer& layer, int64_t token) {
  const int64_t blocks = layer.x.depth / kBlock;
  for (int64_t b = 0; b < blocks; b++)
    store<S>(Integers(layer.x.values + token * layer.x.depth + b * kBlock), layer.x.blocks[token * blocks + b]);
}

// Runs `of` for the places of an expert, as many at a time as a tile meets.
template <class Of>
void by_columns(const Layer& layer, int64_t expert, Of of) {
  const int64_t end = layer.starts[expert + 1];
  for (int64_t place = layer.starts[expert]; place < end; place += kUnitColumns)
    of(place, end - place < kUnitColumns ? end - place : kUnitColumns);
}

template <class S>
void gather(const Layer& layer, int64_t expert) {
  if constexpr (S::words_from <= kUnitColumns)
    by_columns(layer, expert, [&](int64_t place, int64_t columns) {
      if (columns < S::words_from) return;
      for (int64_t p = place; p < place + columns; p++) {
        const float* values = layer.x.values + layer.pairs[p] / layer.top_k * layer.x.depth;
        for (int64_t b = 0; b < layer.x.depth / kBlock; b++)
          store<S>(Integers(values + b * kBlock), layer.x.words[b * layer.places + p]);
      }
    });
}

// exp(x), to 3 ulp and for |x| up to 87; a NaN counts as 87.
template <class S>
typename S::F32 exponential(typename S::F32 x) {
  using F32 = typename S::F32;
  using I32 = typename S::I32;
  x = x < 87.0f ? x : F32{} + 87.0f;
  x = x > -87.0f ? x : F32{} - 87.0f;
  const F32 shifted = x * 1.44269504f + 0x1.8p23f;  // x / log 2, rounded
  const F32 n = shifted - 0x1.8p23f;
  const F32 r = (x - n * 0x1.62e4p-1f) - n * 1.42860677e-6f;  // log 2 in two terms; |r| <= 0.35
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  F32 e = F32{} + 1.0f / 5040;
  for (const float c : kTaylor) e = e * r + c;
  return (F32)((I32)e + (((I32)shifted) << 23));
}

// A NaN stays one.
template <class S>
typename S::F32 at_most(typename S::F32 x, float limit) {
  return x > limit ? typename S::F32{} + limit : x;
}

// Of g and u; a gate beyond exp's range or not a number decides itself what becomes of the product.
template <class S>
typename S::F32 gated(const Activation& of, typename S::F32 g, typename S::F32 u) {
  g = at_most<S>(g, of.limit);
  u = -at_most<S>(-at_most<S>(u, of.limit), of.limit) + of.shift;
  typename S::F32 steep = of.slope * g;
  if (of.cubic != 0.0f) steep *= 1.0f + of.cubic * g * g;
  return g * u / (1.0f + exponential<S>(-steep));
}

template <class S>
typename S::F32 relu_squared(typename S::F32 u) {
  u = u < 0.0f ? typename S::F32{} : u;
  return u * u;
}

template <class S>
typename S::F32 load(const float* from) {
  typename S::F32 values;
  memcpy(&values, from, sizeof values);
  return values;
}

// Of a unit's rows times columns, zeros at first.
template <class S>
class Sums {
 public:
  Sums(int64_t rows, int64_t columns) : columns_(columns) {
    for (int64_t i = 0; i < rows / S::lanes * columns; i++) sums_[i] = typename S::F32{};
  }
  // Rows `row` .. of the unit, for each column.
  typename S::F32* of(int64_t row) { return sums_ + row / S::lanes * columns_; }

 private:
  int64_t columns_;
  typename S::F32 sums_[kUnitRows / S::lanes * kUnitColumns];
};

template <class S>
void gate_up(const Layer& layer, Unit unit, Unit next) {
  using F32 = typename S::F32;
  const Activations& h = layer.h;
  const auto [expert, row, rows] = unit;
  by_columns(layer, expert, [&, unit, next, expert = expert, row = row, rows = rows](int64_t place, int64_t columns) {
    int64_t tokens[kUnitColumns];
    for (int64_t c = 0; c < columns; c++) tokens[c] = layer.pairs[place + c] / layer.top_k;
    const Columns x{layer.x, tokens, layer.places, place, columns};
    float local[kUnitColumns * kUnitRows];
    float* out = layer.exact ? h.values + place * h.depth + row : local;
    const int64_t stride = layer.exact ? h.depth : kUnitRows;
    Sums<S> g(rows, columns), u(rows, columns);
    by_pieces<S::lanes>(unit, next, layer.up.depth, [&](const Piece& now, const Piece& then, int64_t scales) {
      Ahead ahead;
      if (layer.has_gate) ahead.plan(layer.gate, then, scales);
      ahead.plan(layer.up, then, scales);
      ahead.spread(now.weights * (layer.has_gate ? 2 : 1));
      if (layer.has_gate) matmul<S>(layer.gate, now, layer.exact, x, ahead, g.of(now.row - row));
      matmul<S>(layer.up, now, layer.exact, x, ahead, u.of(now.row - row));
    });
    for (int64_t r = 0; r < rows; r += S::lanes) {
      const int64_t at = expert * h.depth + row + r;
      const F32 gate_bias = layer.gate_bias ? load<S>(layer.gate_bias + at) : F32{};
      const F32 up_bias = layer.up_bias ? load<S>(layer.up_bias + at) : F32{};
      for (int64_t c = 0; c < columns; c++) {
        const float weight = layer.weight_on_input ? layer.weights[layer.pairs[place + c]] : 1.0f;
        const F32 up = u.of(r)[c] * weight + up_bias;
        const F32 values =
            layer.has_gate ? gated<S>(layer.activation, g.of(r)[c] * weight + gate_bias, up) : relu_squared<S>(up);
        memcpy(out + c * stride + r, &values, sizeof values);
      }
    }
    if (layer.exact) return;
    for (int64_t c = 0; c < columns; c++)
      for (int64_t b = 0; b < rows / kBlock; b++) {
        const Integers values(local + c * kUnitRows + b * kBlock);
        const int64_t block = row / kBlock + b;
        if (columns >= S::words_from) {
          if constexpr (S::words_from <= kUnitColumns) store<S>(values, h.words[block * layer.places + place + c]);
        } else {
          store<S>(values, h.blocks[(place + c) * (h.depth / kBlock) + block]);
        }
      }
  });
}

template <class S>
void down(const Layer& layer, Unit unit, Unit next) {
  using F32 = typename S::F32;
  const int64_t hidden = layer.down.outputs, row = unit.row, rows = unit.rows;
  for (int64_t a = 0; a < layer.actives; a++) {
    const int64_t expert = layer.active[a];
    const float scale = layer.down_scale ? layer.down_scale[expert] : 1.0f;
    const Unit here{expert, row, rows};
    const Unit after =
        a + 1 < layer.actives ? Unit{layer.active[a + 1], row, rows} : Unit{layer.active[0], next.row, next.rows};
    by_columns(layer, expert, [&](int64_t place, int64_t columns) {
      int64_t places[kUnitColumns];
      for (int64_t c = 0; c < columns; c++) places[c] = place + c;
      const Columns h{layer.h, places, layer.places, place, columns};
      Sums<S> out(rows, columns);
      by_pieces<S::lanes>(here, after, layer.down.depth, [&](const Piece& now, const Piece& then, int64_t scales) {
        Ahead ahead;
        ahead.plan(layer.down, then, scales);
        ahead.spread(now.weights);
        matmul<S>(layer.down, now, layer.exact, h, ahead, out.of(now.row - row));
      });
      for (int64_t r = 0; r < rows; r += S::lanes) {
        const F32 bias = layer.down_bias ? load<S>(layer.down_bias + expert * hidden + row + r) : F32{};
        for (int64_t c = 0; c < columns; c++) {
          const int32_t pair = layer.pairs[place + c];
          const float weight = layer.weight_on_input ? scale : layer.weights[pair] * scale;
          float* at = layer.y + pair / layer.top_k * hidden + row + r;
          const F32 y = load<S>(at) + (out.of(r)[c] + bias) * weight;
          memcpy(at, &y, sizeof y);
        }
      }
    });
  }
}

template <class S>
constexpr Kernels kernels() {
  return {S::name, quantise<S>, gather<S>, gate_up<S>, down<S>};
}

}  // namespace
}  // namespace jmoe

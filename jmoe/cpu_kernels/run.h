// A layer from grouping to y: chooses the instruction set and cuts the work into units. No XLA in it.
#pragma once

#include <algorithm>
#include <new>
#include <numeric>
#include <string_view>
#include <utility>
#include <vector>

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "parallel.h"

namespace jmoe {

// Tokens whose hidden activations are held at once: they bound the scratch memory, at 60 MB for Mixtral-8x7B's.
constexpr int64_t kTokensAtOnce = 512;

// Scratch arrays that live as long as this: cache lines of their own, not cleared.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() {
    for (void* block : blocks_) ::operator delete(block, kLine);
  }
  template <class T>
  T* take(int64_t count) {
    blocks_.reserve(blocks_.size() + 1);
    blocks_.push_back(::operator new(static_cast<size_t>(count) * sizeof(T) + 1, kLine));
    return static_cast<T*>(blocks_.back());
  }
  Activations activations(int64_t rows, int64_t places, int64_t depth, bool ints, bool values) {
    const int64_t blocks = depth / kBlock;
    return {depth, values ? take<float>(rows * depth) : nullptr, ints ? take<Block>(rows * blocks) : nullptr,
            ints ? take<WordBlock>(places * blocks) : nullptr};
  }

 private:
  static constexpr std::align_val_t kLine{64};
  std::vector<void*> blocks_;
};

// The kernels of the instruction set of that name, or of the best that this machine has where it is empty; null where
// neither machine nor build has it.
inline const Kernels* choose_kernels(std::string_view isa) {
  std::vector<const Kernels*> best_first;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    best_first = {&kAvx512Vnni, &kAvx512VnniHalved};
    // It adds on twice as many pipes as it multiplies on.
    if (__builtin_cpu_is("amd")) std::swap(best_first[0], best_first[1]);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best_first.push_back(&kAvx2);
#elif defined(__aarch64__)
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP)
#endif
    best_first.push_back(&kNeon);
#endif
  best_first.push_back(&kPortable);
  for (const Kernels* kernels : best_first)
    if (isa.empty() || isa == kernels->name) return kernels;
  return nullptr;
}

struct Places {
  std::vector<int64_t> starts, active;  // [E + 1]; experts that have one
  std::vector<int32_t> pairs;           // [P]
};

// Pairs by expert, in pair order within one; ids outside [0, E) have no place.
inline Places group_by_expert(const int32_t* ids, int64_t pairs, int64_t experts) {
  const auto inside = [&](int32_t id) { return id >= 0 && id < experts; };
  Places places{std::vector<int64_t>(experts + 1), {}, {}};
  for (int64_t p = 0; p < pairs; p++)
    if (inside(ids[p])) places.starts[ids[p] + 1]++;
  std::partial_sum(places.starts.begin(), places.starts.end(), places.starts.begin());
  places.pairs.resize(places.starts[experts]);
  std::vector<int64_t> next(places.starts.begin(), places.starts.end() - 1);
  for (int64_t p = 0; p < pairs; p++)
    if (inside(ids[p])) places.pairs[next[ids[p]]++] = static_cast<int32_t>(p);
  for (int64_t e = 0; e < experts; e++)
    if (places.starts[e] < places.starts[e + 1]) places.active.push_back(e);
  return places;
}

// Rows of a unit: as many as share a cache line of scales, or fewer where threads would be idle.
inline int64_t unit_rows(int64_t rows, int64_t repeats, int64_t threads) {
  return rows / kUnitRows * repeats >= 4 * threads ? kUnitRows : kBlock;
}

// Up to kTokensAtOnce tokens; `layer` has all but what follows from the ids.
template <class Pool>
void run_tokens(Pool& pool, const Kernels& kernel, Layer layer, const int32_t* ids, int64_t tokens, int64_t experts) {
  Arena arena;
  const int64_t inner = layer.up.outputs, hidden = layer.down.outputs;
  const Places places = group_by_expert(ids, tokens * layer.top_k, experts);
  layer.starts = places.starts.data();
  layer.pairs = places.pairs.data();
  layer.active = places.active.data();
  layer.actives = places.active.size();
  layer.places = places.pairs.size();
  float* const x = layer.x.values;
  layer.x = arena.activations(tokens, layer.places, hidden, !layer.exact, false);
  layer.x.values = x;
  layer.h = arena.activations(layer.places, layer.places, layer.down.depth, !layer.exact, layer.exact);

  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t wide = unit_rows(inner, layer.actives, threads), tall = unit_rows(hidden, 1, threads);
  const int64_t per_expert = (inner + wide - 1) / wide;
  const auto wide_unit = [&](int64_t unit) {
    if (unit < 0) return Unit{};
    const int64_t row = unit % per_expert * wide;
    return Unit{layer.active[unit / per_expert], row, std::min(wide, inner - row)};
  };
  const auto tall_unit = [&](int64_t unit) {
    return unit < 0 ? Unit{} : Unit{0, unit * tall, std::min(tall, hidden - unit * tall)};
  };
  run_phases(pool, {
      {layer.exact ? 0 : tokens, [&](int64_t token, int64_t) { kernel.quantise(layer, token); }},
      {layer.exact ? 0 : layer.actives, [&](int64_t a, int64_t) { kernel.gather(layer, layer.active[a]); }},
      {layer.actives * per_expert,
       [&](int64_t unit, int64_t next) { kernel.gate_up(layer, wide_unit(unit), wide_unit(next)); }},
      {layer.actives ? (hidden + tall - 1) / tall : 0,
       [&](int64_t unit, int64_t next) { kernel.down(layer, tall_unit(unit), tall_unit(next)); }},
  });
}

// y[t] = sum_k weights[t, k] * down_e(act(gate_e x[t], up_e x[t])) for ids i32[T, K]; ids outside [0, E) add nothing.
template <class Pool>
void run_layer(Pool& pool, const Kernels& kernel, Layer layer, const int32_t* ids, int64_t tokens, int64_t experts) {
  const int64_t hidden = layer.down.outputs;
  std::fill_n(layer.y, tokens * hidden, 0.0f);
  for (int64_t left = tokens, now; left > 0; left -= now) {
    now = std::min(kTokensAtOnce, left);
    run_tokens(pool, kernel, layer, ids, now, experts);
    layer.x.values += now * hidden;
    layer.y += now * hidden;
    layer.weights += now * layer.top_k;
    ids += now * layer.top_k;
  }
}

}  // namespace jmoe

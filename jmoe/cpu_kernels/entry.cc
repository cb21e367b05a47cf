// The layer as one call of XLA's FFI: y[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t]).

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jmoe {
namespace {

// Tokens whose hidden activations are held at once: they bound the scratch memory, at 40 MB for Mixtral-8x7B's.
constexpr int64_t kTokensAtOnce = 512;

// Takes a projection's planes off the remaining arguments; `next` is the index of the first. Leading axes are [E] or
// [L, E], of which layer `layer` is taken.
ffi::ErrorOr<Projection> read_projection(ffi::RemainingArgs args, size_t& next, std::string_view name, int64_t layer,
                                         int64_t experts, int64_t outputs, int64_t depth) {
  const auto error = [&](std::string what) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("jmoe_cpu: " + std::string(name) + ": " + what));
  };
  const auto layout = std::find_if(kLayouts, kLayouts + kFormats, [&](const FormatLayout& f) { return f.name == name; });
  if (layout == kLayouts + kFormats) return error("no such format");
  if (depth % layout->block || outputs % kBlock) return error("sizes are no multiple of the blocks");
  Projection w{static_cast<Format>(layout - kLayouts), outputs, depth, {}};
  for (int p = 0; p < layout->planes; p++) {
    const PlaneLayout& plane = layout->plane[p];
    const auto buffer = args.get<ffi::AnyBuffer>(next++);
    if (!buffer.has_value()) return error("a plane is missing");
    const auto dims = buffer->dimensions();
    const int64_t entries = depth / plane.per, rows = plane.by_row ? outputs : entries;
    const int64_t cols = plane.by_row ? entries : outputs;
    const size_t rank = dims.size();
    if (rank < 3 || rank > 4 || dims[rank - 1] != cols || dims[rank - 2] != rows || dims[rank - 3] != experts ||
        ffi::ByteWidth(buffer->element_type()) != static_cast<size_t>(plane.bytes))
      return error("plane " + std::to_string(p) + " has another shape or type");
    const int64_t layers = rank == 4 ? dims[0] : 1, index = std::clamp<int64_t>(layer, 0, layers - 1);
    const int64_t skip = index * experts * rows * cols * plane.bytes;
    w.planes[p] = static_cast<const uint8_t*>(buffer->untyped_data()) + skip;
  }
  return w;
}

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
  // Of N rows: integers and their scales, or f32 values.
  Activations activations(int64_t rows, int64_t depth, bool ints, bool values) {
    Activations a{depth, nullptr, nullptr, nullptr, nullptr};
    if (values) a.values = take<float>(rows * depth);
    if (ints) {
      a.ints = take<uint8_t>(2 * rows * depth);
      a.scales = take<float>(rows * depth / kBlock);
      a.sums = take<int32_t>(rows * depth / 16);
    }
    return a;
  }

 private:
  static constexpr std::align_val_t kLine{64};
  std::vector<void*> blocks_;
};

// The kernels of the best instruction set that this machine has, or of the one that JMOE_CPU_ISA names.
const Kernels* choose() {
  std::vector<const Kernels*> best_first;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    best_first.push_back(&kAvx512Vnni);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best_first.push_back(&kAvx2);
#elif defined(__aarch64__)
  best_first.push_back(&kNeon);
#endif
  best_first.push_back(&kPortable);
  const char* wanted = std::getenv("JMOE_CPU_ISA");
  if (wanted == nullptr || *wanted == 0) return best_first[0];
  for (const Kernels* kernels : best_first)
    if (!std::strcmp(kernels->name, wanted)) return kernels;
  return nullptr;
}

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

struct Places {
  std::vector<int64_t> starts, active;  // [E + 1]; experts that have one
  std::vector<int32_t> pairs;           // [P]
};

// Pairs by expert, in pair order within one; ids outside [0, E) have no place.
Places group_by_expert(const int32_t* ids, int64_t pairs, int64_t experts) {
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
int64_t unit_rows(int64_t rows, int64_t repeats, int64_t threads) {
  return rows / kUnitRows * repeats >= 4 * threads ? kUnitRows : kBlock;
}

void run_tokens(ffi::ThreadPool& pool, Layer& layer, const int32_t* ids, int64_t tokens, int64_t experts) {
  const Kernels& kernel = *kernels();
  Arena arena;
  const Places places = group_by_expert(ids, tokens * layer.top_k, experts);
  layer.starts = places.starts.data();
  layer.pairs = places.pairs.data();
  layer.active = places.active.data();
  layer.actives = places.active.size();
  const Activations x = layer.x;
  layer.x = arena.activations(tokens, x.depth, !layer.exact, false);
  layer.x.values = x.values;
  layer.h = arena.activations(places.pairs.size(), layer.down.depth, !layer.exact, layer.exact);

  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t inner = layer.gate.outputs, hidden = layer.down.outputs;
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
      {layer.exact ? 0 : tokens, [&](int64_t token, int64_t) { kernel.quantise(layer.x, token); }},
      {layer.actives * per_expert,
       [&](int64_t unit, int64_t next) { kernel.gate_up(layer, wide_unit(unit), wide_unit(next)); }},
      {layer.actives ? (hidden + tall - 1) / tall : 0,
       [&](int64_t unit, int64_t next) { kernel.down(layer, tall_unit(unit), tall_unit(next)); }},
  });
  layer.x = x;
}

ffi::Error moe_layer(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> topk_ids,
                     ffi::Buffer<ffi::F32> topk_weights, ffi::Buffer<ffi::S32> layer_index, ffi::RemainingArgs planes,
                     ffi::ResultBuffer<ffi::F32> y, std::string_view gate, std::string_view up, std::string_view down,
                     int64_t experts, int64_t inner, bool exact) {
  if (kernels() == nullptr) return ffi::Error::InvalidArgument("jmoe_cpu: JMOE_CPU_ISA names no instruction set here");
  const int64_t tokens = x.dimensions()[0], hidden = x.dimensions()[1], top_k = topk_ids.dimensions()[1];
  if (topk_ids.dimensions()[0] != tokens || topk_weights.dimensions()[0] != tokens ||
      topk_weights.dimensions()[1] != top_k || layer_index.element_count() != 1)
    return ffi::Error::InvalidArgument("jmoe_cpu: shapes of x, topk_ids and topk_weights disagree");
  const int64_t index = *layer_index.typed_data();
  size_t next = 0;
  const auto wide = read_projection(planes, next, gate, index, experts, inner, hidden);
  if (!wide.has_value()) return wide.error();
  const auto wide2 = read_projection(planes, next, up, index, experts, inner, hidden);
  if (!wide2.has_value()) return wide2.error();
  const auto tall = read_projection(planes, next, down, index, experts, hidden, inner);
  if (!tall.has_value()) return tall.error();

  std::memset(y->typed_data(), 0, y->size_bytes());
  Layer layer{};
  layer.gate = *wide;
  layer.up = *wide2;
  layer.down = *tall;
  layer.exact = exact;
  layer.top_k = top_k;
  layer.x.depth = hidden;
  for (int64_t first = 0; first < tokens; first += kTokensAtOnce) {
    layer.x.values = x.typed_data() + first * hidden;
    layer.weights = topk_weights.typed_data() + first * top_k;
    layer.y = y->typed_data() + first * hidden;
    run_tokens(pool, layer, topk_ids.typed_data() + first * top_k, std::min(kTokensAtOnce, tokens - first), experts);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jmoe

extern "C" {
[[gnu::visibility("default")]] XLA_FFI_Error* jmoe_cpu_moe_layer(XLA_FFI_CallFrame*);

// The instruction set in use, or null where JMOE_CPU_ISA names one that is not here.
[[gnu::visibility("default")]] const char* jmoe_cpu_isa() { return jmoe::kernels() ? jmoe::kernels()->name : nullptr; }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jmoe_cpu_moe_layer, jmoe::moe_layer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("gate")
                                  .Attr<std::string_view>("up")
                                  .Attr<std::string_view>("down")
                                  .Attr<int64_t>("experts")
                                  .Attr<int64_t>("inner")
                                  .Attr<bool>("exact"));

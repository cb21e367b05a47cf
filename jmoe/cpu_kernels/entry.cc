// The layer as one call of XLA's FFI: y[t] = sum_k topk_weights[t, k] * down_e(act(gate_e x[t], up_e x[t])).

#include <algorithm>
#include <string>
#include <string_view>

#include "run.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jmoe {
namespace {

// Takes a projection's planes off the remaining arguments; `next` is the index of the first. Leading axes are [E] or
// [L, E], of which layer `layer` is taken.
ffi::ErrorOr<Projection> read_projection(ffi::RemainingArgs args, size_t& next, std::string_view name, int64_t layer,
                                         int64_t experts, int64_t outputs, int64_t depth) {
  const auto error = [&](std::string what) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("jmoe_cpu: " + std::string(name) + ": " + what));
  };
  const auto layout = std::find_if(kLayouts, kLayouts + kFormats, [&](const auto& known) { return known.name == name; });
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

// Floats by expert, f32[E, ...] or f32[L, E, ...], of which layer `layer` is taken; null where the array is empty.
ffi::ErrorOr<const float*> read_leaf(ffi::RemainingArgs args, size_t& next, int64_t layer, int64_t per_layer) {
  const auto leaf = args.get<ffi::Buffer<ffi::F32>>(next++);
  if (!leaf.has_value() || leaf->element_count() % per_layer)
    return ffi::Unexpected(ffi::Error::InvalidArgument("jmoe_cpu: biases and scales have another shape or type"));
  const int64_t layers = leaf->element_count() / per_layer;
  return layers ? leaf->typed_data() + std::clamp<int64_t>(layer, 0, layers - 1) * per_layer : nullptr;
}

// `gate` is empty where there is none; `planes` are followed by gate_bias, up_bias, down_bias and down_scale.
ffi::Error moe_layer(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> topk_ids,
                     ffi::Buffer<ffi::F32> topk_weights, ffi::Buffer<ffi::S32> layer_index, ffi::RemainingArgs planes,
                     ffi::ResultBuffer<ffi::F32> y, std::string_view gate, std::string_view up, std::string_view down,
                     std::string_view isa, int64_t experts, int64_t inner, bool exact, bool weight_on_input,
                     float slope, float cubic, float shift, float limit) {
  const Kernels* const kernels = choose_kernels(isa);
  if (kernels == nullptr)
    return ffi::Error::InvalidArgument("jmoe_cpu: no instruction set " + std::string(isa) + " here");
  const int64_t tokens = x.dimensions()[0], hidden = x.dimensions()[1], top_k = topk_ids.dimensions()[1];
  if (topk_ids.dimensions()[0] != tokens || topk_weights.dimensions()[0] != tokens ||
      topk_weights.dimensions()[1] != top_k || layer_index.element_count() != 1)
    return ffi::Error::InvalidArgument("jmoe_cpu: shapes of x, topk_ids and topk_weights disagree");
  const int64_t index = *layer_index.typed_data();
  size_t next = 0;
  Layer layer{};
  layer.has_gate = !gate.empty();
  if (layer.has_gate) {
    const auto weights = read_projection(planes, next, gate, index, experts, inner, hidden);
    if (!weights.has_value()) return weights.error();
    layer.gate = *weights;
  }
  const auto up_weights = read_projection(planes, next, up, index, experts, inner, hidden);
  if (!up_weights.has_value()) return up_weights.error();
  layer.up = *up_weights;
  const auto down_weights = read_projection(planes, next, down, index, experts, hidden, inner);
  if (!down_weights.has_value()) return down_weights.error();
  layer.down = *down_weights;
  const struct {
    const float*& leaf;
    int64_t per_expert;
  } leaves[] = {{layer.gate_bias, inner}, {layer.up_bias, inner}, {layer.down_bias, hidden}, {layer.down_scale, 1}};
  for (const auto& [leaf, per_expert] : leaves) {
    const auto values = read_leaf(planes, next, index, experts * per_expert);
    if (!values.has_value()) return values.error();
    leaf = *values;
  }

  layer.exact = exact;
  layer.weight_on_input = weight_on_input;
  layer.activation = {slope, cubic, shift, limit};
  layer.top_k = top_k;
  layer.x.values = x.typed_data();
  layer.weights = topk_weights.typed_data();
  layer.y = y->typed_data();
  run_layer(pool, *kernels, layer, topk_ids.typed_data(), tokens, experts);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jmoe

extern "C" {
// The number changes with the arguments: __init__.py does not load what was built for others.
[[gnu::visibility("default")]] XLA_FFI_Error* jmoe_cpu_moe_layer_2(XLA_FFI_CallFrame*);

// The name of the instruction set that `wanted` (empty: the best) stands for here, or null.
[[gnu::visibility("default")]] const char* jmoe_cpu_isa(const char* wanted) {
  const jmoe::Kernels* const kernels = jmoe::choose_kernels(wanted);
  return kernels ? kernels->name : nullptr;
}
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jmoe_cpu_moe_layer_2, jmoe::moe_layer,
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
                                  .Attr<std::string_view>("isa")
                                  .Attr<int64_t>("experts")
                                  .Attr<int64_t>("inner")
                                  .Attr<bool>("exact")
                                  .Attr<bool>("weight_on_input")
                                  .Attr<float>("slope")
                                  .Attr<float>("cubic")
                                  .Attr<float>("shift")
                                  .Attr<float>("limit"));

// Runs the CPU kernels without Python and XLA, for sanitizers and emulators: each argument is a layer in a file, as
// test_cpu_kernels_alone.py writes it; y goes to the file's name + ".y". Arrays have exactly their size on the heap.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "run.h"

namespace {

struct Threads {
  std::vector<std::thread> running;
  int64_t num_threads() const { return 3; }
  template <class Work>
  void Schedule(Work work) {
    running.emplace_back(std::move(work));
  }
  ~Threads() {
    for (std::thread& thread : running) thread.join();
  }
};

struct Header {
  int64_t tokens, hidden, inner, experts, top_k, exact, weight_on_input, leaves, formats[3];  // a gate of -1: none
  jmoe::Activation activation;
};

template <class T>
std::vector<T> read(std::FILE* file, int64_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, file) != static_cast<size_t>(count)) std::abort();
  return values;
}

void run(const std::string& path, const jmoe::Kernels& kernels) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) std::abort();
  const Header of = read<Header>(file, 1)[0];
  std::vector<float> x = read<float>(file, of.tokens * of.hidden), y(x.size());
  const auto ids = read<int32_t>(file, of.tokens * of.top_k);
  const auto weights = read<float>(file, of.tokens * of.top_k);
  std::vector<std::vector<uint8_t>> planes;
  const auto projection = [&](int64_t format, int64_t outputs, int64_t depth) {
    const jmoe::FormatLayout& layout = jmoe::kLayouts[format];
    jmoe::Projection w{static_cast<jmoe::Format>(format), outputs, depth, {}};
    for (int p = 0; p < layout.planes; p++) {
      const int64_t entries = of.experts * outputs * depth / layout.plane[p].per;
      planes.push_back(read<uint8_t>(file, entries * layout.plane[p].bytes));
      w.planes[p] = planes.back().data();
    }
    return w;
  };
  jmoe::Layer layer{};
  layer.has_gate = of.formats[0] >= 0;
  if (layer.has_gate) layer.gate = projection(of.formats[0], of.inner, of.hidden);
  layer.up = projection(of.formats[1], of.inner, of.hidden);
  layer.down = projection(of.formats[2], of.hidden, of.inner);
  std::vector<std::vector<float>> leaves;
  const auto leaf = [&](int64_t count) {
    leaves.push_back(read<float>(file, count));
    return leaves.back().data();
  };
  if (of.leaves) {
    if (layer.has_gate) layer.gate_bias = leaf(of.experts * of.inner);
    layer.up_bias = leaf(of.experts * of.inner);
    layer.down_bias = leaf(of.experts * of.hidden);
    layer.down_scale = leaf(of.experts);
  }
  std::fclose(file);
  layer.exact = of.exact;
  layer.weight_on_input = of.weight_on_input;
  layer.activation = of.activation;
  layer.top_k = of.top_k;
  layer.x.values = x.data();
  layer.weights = weights.data();
  layer.y = y.data();
  Threads threads;
  jmoe::run_layer(threads, kernels, layer, ids.data(), of.tokens, of.experts);
  std::FILE* out = std::fopen((path + ".y").c_str(), "wb");
  std::fwrite(y.data(), sizeof(float), y.size(), out);
  std::fclose(out);
}

}  // namespace

int main(int count, char** arguments) {
  const jmoe::Kernels* kernels = count > 1 ? jmoe::choose_kernels(arguments[1]) : nullptr;
  if (kernels == nullptr) return 2;
  for (int i = 2; i < count; i++) run(arguments[i], *kernels);
}

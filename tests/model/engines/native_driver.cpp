// Runs native.cpp without Python: under the sanitizers, or for another processor under an emulator.
//
//     native_driver INPUT OUTPUT
//
// INPUT is what `write_case` in native_case.py writes: integers of 8 bytes and arrays of floats. OUTPUT gets the SR
// image, the masks, and per module the important pixels and the multiply-adds.

#include "../../../model/engines/native.cpp"

#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace {

FILE* input;

int64_t read_number() {
  int64_t number = 0;
  if (fread(&number, sizeof number, 1, input) != 1) std::abort();
  return number;
}

// Memory of exactly this size, so that the sanitizers notice every access outside
float* read_floats() {
  const int64_t count = read_number();
  if (count == 0) return nullptr;
  float* floats = (float*)operator new(count * sizeof(float), std::align_val_t(64));
  if (fread(floats, sizeof(float), count, input) != size_t(count)) std::abort();
  return floats;
}

void read(const float*& pointer) { pointer = read_floats(); }
void read(int64_t& number) { number = read_number(); }

template <class... Fields>
void read_all(Fields&... fields) {
  (read(fields), ...);
}

Layer read_layer() {
  Layer l;
  read_all(l.full, l.thin, l.collect, l.n_in, l.n_out);
  return l;
}

Module read_module(int64_t n_layers) {
  Module m;
  read_all(m.first, m.first_bias, m.mid, m.mid_bias, m.up, m.up_bias);
  read_all(m.collect_bias, m.squeeze, m.squeeze_bias, m.excite, m.excite_bias, m.reduce, m.hidden);
  Layer* layers = new Layer[n_layers];
  for (int64_t i = 0; i < n_layers; i++) layers[i] = read_layer();
  m.layers = layers;
  return m;
}

Net read_net() {
  Net n;
  read_all(n.first, n.first_bias, n.head, n.head_bias, n.reduce_bias, n.fuse, n.fuse_bias, n.tail, n.tail_bias);
  read_all(n.n_modules, n.n_layers, n.n_colors, n.scale);
  Module* modules = new Module[n.n_modules];
  for (int64_t i = 0; i < n.n_modules; i++) modules[i] = read_module(n.n_layers);
  n.modules = modules;
  return n;
}

void run_threads(void (*function)(void*), void* data, unsigned count, unsigned) {
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < count; i++) threads.emplace_back(function, data);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int, char** arguments) {
  input = fopen(arguments[1], "rb");
  FILE* output = fopen(arguments[2], "wb");
  if (!input || !output) return 1;
  const Net net = read_net();
  Call call = {};
  call.net = &net, call.run_parallel = run_threads;
  read_all(call.height, call.width, call.strip_rows, call.keep_head, call.threads, call.image);
  const int64_t pixels = call.height * call.width, values = net.n_colors * net.scale * net.scale * pixels;
  call.sr = read_floats();
  const int64_t bytes = smsr_workspace(&call);
  call.workspace = (char*)operator new(bytes, std::align_val_t(64));
  std::memset(call.workspace, 0xFF, bytes);  // NaN: whatever is used before it is written shows up

  std::vector<uint8_t> masks(net.n_modules * pixels, 2);
  std::vector<int64_t> counts(2 * net.n_modules), strip(2);
  smsr_head(&call);
  for (int64_t k = 0; k < net.n_modules; k++) {
    for (int64_t top = 0; top < call.height; top += call.strip_rows) {
      const int64_t bottom = std::min(call.height, top + call.strip_rows);
      smsr_module(&call, k, top, bottom, masks.data() + k * pixels, strip.data());
      for (int i = 0; i < 2; i++) counts[2 * k + i] += strip[i];
    }
    smsr_attend(&call, k);
  }
  smsr_reconstruct(&call);
  fwrite(call.sr, sizeof(float), values, output);
  fwrite(masks.data(), 1, masks.size(), output);
  fwrite(counts.data(), sizeof(int64_t), counts.size(), output);
  return fclose(output);
}

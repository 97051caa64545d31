// SMSR on CPUs: a forward pass that computes what the masks ask for. native.py prepares the weights, allocates all
// memory, and calls the functions at the end of this file. docs/sparse-inference.md explains the method with a figure.
//
// A map has C floats per pixel and a border of one pixel, which is zero. The channels of a layer are sorted, dense ones
// first. An unimportant pixel has valid numbers only in the dense channels of its layer, padded to whole vectors; its
// other channels hold leftovers of earlier calls and are never used, so nothing is cleared, gathered or scattered.
//
// - 3x3 convolutions of important pixels are Winograd's F(2x2, 3x3) on the 2x2 blocks that contain one. Four outputs
//   take 16 products instead of 36. A few blocks at a time are transformed, multiplied by 16 matrices, and transformed
//   back, all in the cache.
// - Dense channels of unimportant pixels are convolved directly, in segments of neighbors in a row.
//
// A module runs on strips of rows, so that the maps of its layers are small. Every sum is computed in an order that
// does not depend on the threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (void)0
#endif

namespace {

// ---- vectors -------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats per vector
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
typedef float vec __attribute__((vector_size(VL * sizeof(float))));

constexpr int C = SMSR_FEATURES;       // channels of a map, a multiple of 16
constexpr int R = SMSR_MASK_FEATURES;  // channels of the mask branch, padded to a multiple of 16
constexpr int GROUPS = C / VL;         // vectors per pixel
constexpr int ROWS = 6;                // rows of a product that are computed at a time,
constexpr int COLUMNS = VL == 8 ? 2 : 4;  // by this many vectors: as many as there are registers for
constexpr int TASK = 4 * ROWS;         // blocks that a thread takes at a time
constexpr int SEGMENT = 12;            // neighboring pixels of a row
constexpr int SEGMENT_TASK = 16;       // segments that a thread takes at a time
constexpr int BAND = 2048;             // blocks, important or not, that a layer computes before the next one continues
constexpr int TAPS = 16;               // nine numbers per pixel of the transposed convolution, padded
constexpr int LINE = 16;               // floats per cache line
constexpr int AHEAD = 8;               // rows of weights that are prefetched
constexpr int OWN[4] = {5, 6, 9, 10};  // positions of a 2x2 block in the 4x4 pixels around it
constexpr uint32_t OWN_BITS = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10, ALL_BITS = 0xFFFF;
alignas(64) const float ZEROS[C] = {};

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec relu(vec v) { return v > 0 ? v : vec{}; }
inline void prefetch(const float* p) { __builtin_prefetch(p); }
inline void prefetch(const float* pixel, int channels) {
  for (int c = 0; c < channels; c += LINE) prefetch(pixel + c);
}
inline int wide(int64_t n) { return (n + VL - 1) / VL * VL; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- what native.py passes -----------------------------------------------------------------------------------------

struct Layer {
  const float* full;     // 16 x (C, C - skip): Winograd's matrices; skip is wide(n_out) in the first layer, else 0
  const float* thin;     // 9 x (n_in, wide(n_out)): dense channels from dense channels
  const float* collect;  // (C, C): its part of the 1x1 collection
  int64_t n_in, n_out;   // dense channels
};
struct Module {
  const float* first;  // 16 x (C, R + skip): the mask branch and the first layer's dense channels; null: no masks
  const float *first_bias, *mid, *mid_bias, *up, *up_bias;  // (R), 9 x (R, R), (R), (R, TAPS), (1)
  const float *collect_bias, *squeeze, *squeeze_bias;  // (C), (hidden, C), (hidden)
  const float *excite, *excite_bias;                   // (C, hidden), (C)
  const float* reduce;  // (C, C): its part of the 1x1 convolution over all modules
  int64_t hidden;
  const Layer* layers;
};
struct Net {
  const float *first, *first_bias, *head, *head_bias;  // (3 x 3 x n_colors, C), (C), 16 x (C, C), (C)
  const float *reduce_bias, *fuse, *fuse_bias;         // (C), 16 x (C, C), (C)
  const float *tail, *tail_bias;                       // per C outputs 16 x (C, wide(outputs)); all outputs, padded
  int64_t n_modules, n_layers, n_colors, scale;
  const Module* modules;
};
typedef void (*RunParallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel

struct Call {  // one image
  const Net* net;
  int64_t height, width;  // even
  int64_t strip_rows;     // the largest number of rows of a strip
  int64_t keep_head;      // whether the features of the head are kept or computed again
  int64_t threads;
  RunParallel run_parallel;  // of PyTorch's OpenMP pool
  char* workspace;
  const float* image;  // (n_colors, height, width), without its mean
  float* sr;           // (n_colors, scale height, scale width); the network is added to it
};

// ---- work memory ---------------------------------------------------------------------------------------------------

struct Block {
  int64_t pixel;  // its top left pixel
  uint32_t bits;  // which of the 4x4 pixels around it are important
};
struct Segment {
  int64_t pixel;  // its first pixel
  uint32_t bits;  // which of its pixels are not important
};

struct Scratch {  // of a thread
  static constexpr int V_STEP = ROWS * C + 16, M_STEP = ROWS * COLUMNS * VL + 16;  // not a power of two, for the cache
  alignas(64) float v[16 * V_STEP];
  alignas(64) float m[16 * M_STEP];
};

struct Space {
  float *planes, *head, *features, *module, *total;  // the bordered image and maps of all pixels
  float *layers, *pooled, *taps;                     // of the pixels of a strip: L maps, and two of half the resolution
  uint8_t* mask;                                     // of a strip, bordered
  Block* blocks;
  Segment* segments;
  int64_t *first_block, *first_segment;  // of each row of blocks
  float* sums;                           // (tasks, C)
  double* pooled_sums;                   // (C)
  Scratch* scratch;
  int64_t layer_size;  // floats per map of a layer
  int64_t bytes;
};

// The largest number of rows of a strip, with the rows around it that its layers see
int64_t rows_with_halo(const Call& call) {
  return std::min(call.height, call.strip_rows + 2 * (call.net->n_layers + 1));
}

Space lay_out(const Call& call) {
  uintptr_t end = (uintptr_t)call.workspace;
  auto take = [&](auto& pointer, int64_t count) {
    pointer = (std::remove_reference_t<decltype(pointer)>)end;
    const size_t bytes = count * sizeof *pointer, padded = bytes / 64 * 64 + 128;
    if (call.workspace) ASAN_POISON_MEMORY_REGION((char*)end + bytes, padded - bytes);  // between the parts
    end += padded;
  };
  const int64_t h = call.height, w = call.width, rows = rows_with_halo(call);
  const int64_t pixels = (h + 2) * (w + 2) + SEGMENT;  // segments may end behind the last pixel
  const int64_t strip = (rows + 2) * (w + 2) + SEGMENT, half = (rows / 2 + 5) * (w / 2 + 2) + SEGMENT;
  const int64_t blocks = rows / 2 * (w / 2), segments = rows * divide_up(w, SEGMENT);
  Space s;
  take(s.planes, call.net->n_colors * pixels + SEGMENT);
  for (float** map : {&s.features, &s.module, &s.total}) take(*map, pixels * C);
  s.head = s.features;  // overwritten by the first module
  if (call.keep_head) take(s.head, pixels * C);
  s.layer_size = strip * C;
  take(s.layers, call.net->n_layers * s.layer_size);
  take(s.pooled, half * R);
  take(s.taps, half * TAPS);
  take(s.mask, strip);
  take(s.blocks, blocks);
  take(s.segments, segments);
  take(s.first_block, rows / 2 + 1);
  take(s.first_segment, rows / 2 + 1);
  take(s.sums, (divide_up(blocks, TASK) + divide_up(segments, SEGMENT_TASK)) * C);
  take(s.pooled_sums, C);
  take(s.scratch, call.threads);
  s.bytes = end - (uintptr_t)call.workspace;
  return s;
}

// Zero the border of a map of `rows` rows
void clear_border(float* map, int64_t rows, int64_t pitch, int channels) {
  const size_t bytes = channels * sizeof(float);
  std::memset(map, 0, pitch * bytes);
  std::memset(map + (rows + 1) * pitch * channels, 0, pitch * bytes);
  for (int64_t y = 1; y <= rows; y++) {
    std::memset(map + y * pitch * channels, 0, bytes);
    std::memset(map + (y * pitch + pitch - 1) * channels, 0, bytes);
  }
}

// ---- products ------------------------------------------------------------------------------------------------------

// f(i, k, acc[i][k]) for the first `count` rows; unrolled, because the compiler would keep `acc` in memory otherwise
template <int M, int N, class F>
inline __attribute__((always_inline)) void for_rows(vec (&acc)[M][N], int64_t count, F f) {
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
    if (i < count)
#pragma GCC unroll 4
      for (int k = 0; k < N; k++) f(i, k, acc[i][k]);
}

// Set each row to `values`
template <int M, int N>
inline void fill(vec (&acc)[M][N], const float* values) {
  for_rows(acc, M, [&](int, int k, vec& v) { v = load(values + k * VL); });
}

// Columns of one of several matrices (K, n), which are stored as (n / LINE, matrices, K, LINE)
struct Columns {
  const float* first;
  int64_t step;  // floats to the next LINE columns
};
inline Columns columns_of(const float* matrices, int count, int K, int index, int column) {
  return {matrices + (column / LINE * count + index) * K * LINE, int64_t(count) * K * LINE};
}

// acc += A B for M rows of A, row(i) is the i-th, and N vectors of the columns of B (K, .)
template <int M, int N, class Row>
inline __attribute__((always_inline)) void multiply(vec (&acc)[M][N], Row row, Columns b, int K) {
  for (int k = 0; k < K; k++) {
    vec w[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      const float* p = b.first + j * VL / LINE * b.step + k * LINE + j * VL % LINE;
      w[j] = load(p);
      if (j * VL % LINE == 0) prefetch(p + AHEAD * LINE);
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) acc[i][j] += row(i)[k] * w[j];
  }
}

template <int N> struct Width { static constexpr int value = N; };

// f(width, column) for parts of at most COLUMNS vectors, which together are n columns
template <class F>
inline void for_columns(int n, F f) {
  for (int j = 0, left = n / VL; left > 0;) {
    const int take = left == COLUMNS + 1 && VL == LINE ? 3 : std::min(left, COLUMNS);
    if (take == 1) f(Width<1>(), j);
    if (take == 2) f(Width<2>(), j);
    if constexpr (COLUMNS > 2) {
      if (take == 3) f(Width<3>(), j);
      if (take == 4) f(Width<4>(), j);
    }
    j += take * VL, left -= take;
  }
}

// c (ROWS, N vectors) = a (ROWS, C) b (C, .); a function of its own, so that its inner loop has all registers
template <int N>
__attribute__((noinline)) void product(const float* a, Columns b, float* c) {
  vec acc[ROWS][N] = {};
  multiply(acc, [&](int i) { return a + i * C; }, b, C);
  for_rows(acc, ROWS, [&](int i, int k, vec v) { store(c + (i * N + k) * VL, v); });
}

// ---- Winograd's convolution on 2x2 blocks --------------------------------------------------------------------------

struct Source {  // a map as it is read
  const float* map;
  int64_t pitch;  // pixels per row
  int groups;     // vectors that are valid at unimportant pixels
};

// The 4x4 pixels at(i) -> 16 vectors B' d B, for the vectors begin...end of their channels
template <class At>
inline __attribute__((always_inline)) void transform(At at, int begin, int end, float* v) {
  for (int g = begin; g < end; g++) {
    vec d[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; x++) {
      const vec d0 = load(at(x) + g * VL), d1 = load(at(4 + x) + g * VL);
      const vec d2 = load(at(8 + x) + g * VL), d3 = load(at(12 + x) + g * VL);
      d[0][x] = d0 - d2, d[1][x] = d1 + d2, d[2][x] = d2 - d1, d[3][x] = d1 - d3;
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; y++) {
      float* to = v + 4 * y * Scratch::V_STEP + g * VL;
      store(to, d[y][0] - d[y][2]);
      store(to + Scratch::V_STEP, d[y][1] + d[y][2]);
      store(to + 2 * Scratch::V_STEP, d[y][2] - d[y][1]);
      store(to + 3 * Scratch::V_STEP, d[y][1] - d[y][3]);
    }
  }
}

inline void transform_block(const Source& in, const Block& block, float* v) {
  const float* corner = in.map + (block.pixel - in.pitch - 1) * C;
  auto pixel = [&](int i) { return corner + (i / 4 * in.pitch + i % 4) * C; };
  const int always = block.bits == ALL_BITS ? GROUPS : in.groups;
  transform(pixel, 0, always, v);
  if (always == GROUPS) return;
  const float* important[16];
  for (int i = 0; i < 16; i++) important[i] = block.bits >> i & 1 ? pixel(i) : ZEROS;
  transform([&](int i) { return important[i]; }, always, GROUPS, v);
}

// Load the pixels that the next block needs, of the 4x4 the i-th
inline void prefetch_pixel(const Source& in, const Block& block, int i) {
  const float* pixel = in.map + (block.pixel + (i / 4 - 1) * in.pitch + i % 4 - 1) * C;
  prefetch(pixel, block.bits >> i & 1 ? C : in.groups * VL);
}

// out(t, g, y): y[4] are the outputs of block t in the vector g of n channels; w: 16 x (C, n)
template <class Out>
void convolve(const Source& in, const Block* blocks, int count, const float* w, int n, Scratch& s, Out out) {
  for (int first = 0; first < count; first += ROWS) {
    const int end = std::min(first + ROWS, count);
    for (int t = 0; t < ROWS; t++) transform_block(in, blocks[std::min(first + t, count - 1)], s.v + t * C);
    for_columns(n, [&](auto width, int column) {
      constexpr int N = width.value;
      for (int i = 0; i < 16; i++) {
        if (column == 0)
          for (int t = end; t < std::min(end + ROWS, count); t++) prefetch_pixel(in, blocks[t], i);
        product<N>(s.v + i * Scratch::V_STEP, columns_of(w, 16, C, i, column), s.m + i * Scratch::M_STEP);
      }
      for (int t = first; t < end; t++)
        for (int g = 0; g < N; g++) {
          const float* m = s.m + ((t - first) * N + g) * VL;
          vec a[4], b[4];
#pragma GCC unroll 4
          for (int x = 0; x < 4; x++) {
            const vec m0 = load(m + x * Scratch::M_STEP), m1 = load(m + (4 + x) * Scratch::M_STEP);
            const vec m2 = load(m + (8 + x) * Scratch::M_STEP), m3 = load(m + (12 + x) * Scratch::M_STEP);
            a[x] = m0 + m1 + m2, b[x] = m1 - m2 - m3;
          }
          const vec y[4] = {a[0] + a[1] + a[2], a[1] - a[2] - a[3], b[0] + b[1] + b[2], b[1] - b[2] - b[3]};
          out(t, column / VL + g, y);
        }
    });
  }
}

// ---- one image -----------------------------------------------------------------------------------------------------

struct Range { int64_t begin, end; };

struct Image {
  const Call& call;
  const Net& net;
  const Space s;
  const int64_t H, W, pitch, half_width;

  explicit Image(const Call& call)
      : call(call), net(*call.net), s(lay_out(call)), H(call.height), W(call.width), pitch(W + 2), half_width(W / 2) {}

  int64_t at(int64_t y, int64_t x) const { return (y + 1) * pitch + x + 1; }

  // f(i, scratch) for all i < count; the thread that is free takes the next one
  template <class F>
  void parallel(int64_t count, F f) const {
    struct Job {
      F& f;
      int64_t count;
      Scratch* scratch;
      std::atomic<int64_t> next, threads;
    } job{f, count, s.scratch, {0}, {0}};
    auto work = [](void* data) {
      Job& job = *(Job*)data;
      Scratch& scratch = job.scratch[job.threads++];
      for (int64_t i; (i = job.next++) < job.count;) job.f(i, scratch);
    };
    const unsigned threads = std::min(call.threads, count);
    if (threads > 1) call.run_parallel(work, &job, threads, 0);
    else if (threads == 1) work(&job);
  }

  // Convolve rows of blocks; out(row, column, g, y) gets their outputs
  template <class Out>
  void convolve_rows(const float* map, Range rows, const float* w, int n, Out out) const {
    const int64_t count = (rows.end - rows.begin) * half_width;
    parallel(divide_up(count, TASK), [&](int64_t task, Scratch& scratch) {
      Block blocks[TASK];
      int64_t row[TASK], column[TASK];
      const int64_t first = task * TASK, n_blocks = std::min<int64_t>(TASK, count - first);
      for (int t = 0; t < n_blocks; t++) {
        row[t] = rows.begin + (first + t) / half_width, column[t] = (first + t) % half_width;
        blocks[t] = {at(2 * row[t], 2 * column[t]), ALL_BITS};
      }
      convolve({map, pitch, GROUPS}, blocks, n_blocks, w, n, scratch,
               [&](int t, int g, const vec* y) { out(row[t], column[t], g, y); });
    });
  }

  // map = convolution of `source` + bias + add
  void convolve_map(const float* source, const float* w, const float* bias, const float* add, float* map) const {
    convolve_rows(source, {0, H / 2}, w, C, [&](int64_t row, int64_t column, int g, const vec* y) {
      for (int i = 0; i < 4; i++) {
        const int64_t to = at(2 * row + i / 2, 2 * column + i % 2) * C + g * VL;
        store(map + to, y[i] + load(bias + g * VL) + (add ? load(add + to) : vec{}));
      }
    });
  }

  // map = ReLU of the first convolution of the image
  void convolve_image(float* map) const {
    parallel(H, [&](int64_t y, Scratch&) {
      for (int64_t x = 0; x < W; x += ROWS)
        for_columns(C, [&](auto width, int j) {
          constexpr int N = width.value;
          vec acc[ROWS][N];
          fill(acc, net.first_bias + j);
          for (int64_t line = 0; line < 3 * net.n_colors; line++) {
            const float* a = s.planes + (line / 3 * (H + 2) + y + line % 3) * pitch + x;
            multiply(acc, [&](int i) { return a + i; }, columns_of(net.first, 3 * net.n_colors, 3, line, j), 3);
          }
          float* to = map + at(y, x) * C + j;
          for_rows(acc, W - x, [&](int i, int k, vec v) { store(to + i * C + k * VL, relu(v)); });
        });
    });
  }

  void load_image() const {
    for (int64_t c = 0; c < net.n_colors; c++) {
      float* plane = s.planes + c * (H + 2) * pitch;
      clear_border(plane, H, pitch, 1);
      for (int64_t y = 0; y < H; y++) std::memcpy(plane + at(y, 0), call.image + (c * H + y) * W, W * sizeof(float));
    }
    for (float* map : {s.head, s.features, s.module, s.total}) clear_border(map, H, pitch, C);
  }

  // f += attention(module); total += f times this module's part of the weights
  void attend(int64_t index, const float* factors) const {
    const float* source = index == 0 ? s.head : s.features;
    parallel(H, [&](int64_t y, Scratch&) {
      for (int64_t x = 0; x < W; x += ROWS) {
        const int64_t pixel = at(y, x) * C, count = std::min<int64_t>(ROWS, W - x);
        for (int64_t c = 0; c < count * C; c += VL) {
          const vec factor = load(factors + c % C);
          store(s.features + pixel + c, load(source + pixel + c) + load(s.module + pixel + c) * factor);
        }
        reduce(index, pixel, count);
      }
    });
  }

  // total += features times the weights of a module, for at most ROWS pixels
  void reduce(int64_t index, int64_t pixel, int64_t count) const {
    const bool is_last = index == net.n_modules - 1;
    int64_t rows[ROWS];
    for (int64_t i = 0; i < ROWS; i++) rows[i] = pixel + std::min(i, count - 1) * C;  // the next are another thread's
    for_columns(C, [&](auto width, int j) {
      constexpr int N = width.value;
      vec acc[ROWS][N];
      for_rows(acc, ROWS, [&](int i, int k, vec& v) {
        v = load((index ? s.total + rows[i] : net.reduce_bias) + j + k * VL);
      });
      multiply(acc, [&](int i) { return s.features + rows[i]; }, columns_of(net.modules[index].reduce, 1, C, 0, j), C);
      for_rows(acc, count, [&](int i, int k, vec v) { store(s.total + rows[i] + j + k * VL, is_last ? relu(v) : v); });
    });
  }

  // The factors of the channels from their sums over the image
  void excite(const Module& m, float* factors) const {
    float mean[C];
    for (int c = 0; c < C; c++) factors[c] = m.excite_bias[c], mean[c] = s.pooled_sums[c] / (H * W);
    for (int64_t j = 0; j < m.hidden; j++) {
      float hidden = m.squeeze_bias[j];
      for (int c = 0; c < C; c++) hidden += m.squeeze[j * C + c] * mean[c];
      for (int c = 0; c < C; c++) factors[c] += m.excite[c * m.hidden + j] * std::max(hidden, 0.f);
    }
    for (int c = 0; c < C; c++) factors[c] = 1 / (1 + std::exp(-factors[c]));
  }

  // Add the tail to the image, whose pixels it shuffles
  void add_tail(const float* map) const {
    const int64_t scale = net.scale, per_color = scale * scale, outputs = net.n_colors * per_color;
    const float* w = net.tail;
    for (int64_t from = 0; from < outputs; from += C) {
      const int n = std::min<int64_t>(C, outputs - from);
      int64_t places[C];  // of the outputs of a pixel, from its top left one on
      for (int64_t k = 0; k < n; k++) {
        const int64_t color = (from + k) / per_color, sub = (from + k) % per_color;
        places[k] = (color * scale * H + sub / scale) * scale * W + sub % scale;
      }
      convolve_rows(map, {0, H / 2}, w, wide(n), [&](int64_t row, int64_t column, int g, const vec* y) {
        for (int i = 0; i < 4; i++) {
          const vec value = y[i] + load(net.tail_bias + from + g * VL);
          float* pixel = call.sr + ((2 * row + i / 2) * scale * W + 2 * column + i % 2) * scale;
          for (int k = 0; k < std::min(VL, n - g * VL); k++) pixel[places[g * VL + k]] += value[k];
        }
      });
      w += 16 * C * C;
    }
  }
};

// ---- one module on a strip -----------------------------------------------------------------------------------------

// Pixels are numbered from `top` on, the first row of the strip with its halo; so are the pointers into maps.
struct ModuleStrip : Image {
  const Module& m;
  const int64_t index;
  const Range inner;       // the rows that are written
  const int64_t top, rows; // with the halo
  const float* features;
  float* module;

  ModuleStrip(const Call& call, int64_t index, Range inner)
      : Image(call), m(net.modules[index]), index(index), inner(inner), top(rows_of_layer(0).begin),
        rows(rows_of_layer(0).end - top), features((index ? s.features : s.head) + top * pitch * C),
        module(s.module + top * pitch * C) {}

  // Later layers need fewer rows around the strip.
  Range rows_of_layer(int64_t layer) const {
    const int64_t halo = (net.n_layers - layer) / 2 * 2;  // even, and not less than one row per later layer
    return {std::max<int64_t>(0, inner.begin - halo), std::min(H, inner.end + halo)};
  }
  Range block_rows(int64_t layer) const {
    const Range range = rows_of_layer(layer);
    return {(range.begin - top) / 2, (range.end - top) / 2};
  }
  float* map(int64_t layer) const { return s.layers + layer * s.layer_size; }
  int skip(int64_t layer) const { return layer == 0 && m.first ? wide(m.layers[0].n_out) : 0; }

  void clear_borders() const {
    for (int64_t l = 0; l < net.n_layers; l++) clear_border(map(l), rows, pitch, C);
    std::memset(s.mask, 0, (rows + 2) * pitch);
  }

  // The mask branch on blocks, and the dense channels of the first layer: a block is a pixel of half the resolution
  Range first_convolution() const {
    const Range strip = {0, rows / 2};
    const Range around = {top ? -1 : 0, std::min(strip.end + 2, (H - top) / 2)};
    const int64_t half_pitch = half_width + 2;
    clear_border(s.pooled, around.end - around.begin, half_pitch, R);
    convolve_rows(features, around, m.first, R + skip(0), [&](int64_t row, int64_t column, int g, const vec* y) {
      if (g < R / VL) {
        const vec bias = load(m.first_bias + g * VL);
        const vec sum = relu(y[0] + bias) + relu(y[1] + bias) + relu(y[2] + bias) + relu(y[3] + bias);
        store(s.pooled + ((row - around.begin + 1) * half_pitch + column + 1) * R + g * VL, sum * 0.25f);
      } else if (row >= 0 && row < strip.end) {
        for (int i = 0; i < 4; i++)
          store(map(0) + at(2 * row + i / 2, 2 * column + i % 2) * C + g * VL - R, relu(y[i]));
      }
    });
    return around;
  }

  // The convolution at half the resolution, and the nine products of each pixel that the transposed convolution adds up
  void middle_convolution(Range around) const {
    const int64_t half_pitch = half_width + 2, count = std::min(rows / 2 + 1, around.end);
    clear_border(s.taps, count, half_pitch, TAPS);
    parallel(count, [&](int64_t row, Scratch& scratch) {
      float* hidden = scratch.v;  // (ROWS, R)
      const float* above = s.pooled + (row - around.begin) * half_pitch * R;
      float* taps = s.taps + ((row + 1) * half_pitch + 1) * TAPS;
      for (int64_t x = 0; x < half_width; x += ROWS) {
        for_columns(R, [&](auto width, int j) {
          constexpr int N = width.value;
          vec acc[ROWS][N];
          fill(acc, m.mid_bias + j);
          for (int tap = 0; tap < 9; tap++) {
            const float* a = above + (tap / 3 * half_pitch + x + tap % 3) * R;
            multiply(acc, [&](int i) { return a + i * R; }, columns_of(m.mid, 9, R, tap, j), R);
          }
          for_rows(acc, ROWS, [&](int i, int k, vec v) { store(hidden + i * R + j + k * VL, relu(v)); });
        });
        for_columns(TAPS, [&](auto width, int j) {
          constexpr int N = width.value;
          vec acc[ROWS][N] = {};
          multiply(acc, [&](int i) { return hidden + i * R; }, columns_of(m.up, 1, R, 0, j), R);
          for_rows(acc, half_width - x, [&](int i, int k, vec v) { store(taps + (x + i) * TAPS + j + k * VL, v); });
        });
      }
    });
  }

  // The mask: where the difference of the two logits is positive
  void decide() const {
    const int64_t half_pitch = half_width + 2;
    const int n_out = m.layers[0].n_out, padding = skip(0) - n_out;
    const float bias = *m.up_bias;
    parallel(rows / 2, [&](int64_t row, Scratch&) {
      for (int64_t x = 0; x < half_width; x++) {
        const float *a = s.taps + ((row + 1) * half_pitch + x + 1) * TAPS, *right = a + TAPS;
        const float *below = a + half_pitch * TAPS, *diagonal = below + TAPS;
        const float logits[4] = {a[4], a[5] + right[3], a[7] + below[1], a[8] + right[6] + below[2] + diagonal[0]};
        for (int i = 0; i < 4; i++) {
          const int64_t pixel = at(2 * row + i / 2, 2 * x + i % 2);
          s.mask[pixel] = logits[i] + bias > 0;
          if (!s.mask[pixel]) std::fill_n(map(0) + pixel * C + n_out, padding, 0.f);  // channels that are not dense
        }
      }
    });
  }

  void make_mask() const {
    if (m.first) {
      middle_convolution(first_convolution());
      decide();
    } else {
      for (int64_t y = 0; y < rows; y++) std::memset(s.mask + at(y, 0), 1, W);
    }
  }

  // Call block(pixel, bits) and segment(pixel, bits) for the blocks and segments of a row of blocks that need work
  template <class OnBlock, class OnSegment>
  void scan(int64_t row, OnBlock block, OnSegment segment) const {
    for (int64_t x = 0; x < W; x += 2) {
      const uint8_t* corner = s.mask + at(2 * row - 1, x - 1);
      uint32_t bits = 0;
      for (int i = 0; i < 16; i++) bits |= uint32_t(corner[i / 4 * pitch + i % 4]) << i;
      if (bits & OWN_BITS) block(Block{at(2 * row, x), bits});
    }
    for (int64_t y = 2 * row; y < 2 * row + 2; y++)
      for (int64_t x = 0; x < W; x += SEGMENT) {
        uint32_t bits = 0;
        for (int k = 0; k < std::min<int64_t>(SEGMENT, W - x); k++) bits |= uint32_t(!s.mask[at(y, x + k)]) << k;
        if (bits) segment(Segment{at(y, x), bits});
      }
  }

  // List the blocks that have an important pixel and the segments that have an unimportant one, in the order of rows
  void make_lists() const {
    parallel(rows / 2, [&](int64_t row, Scratch&) {
      int64_t blocks = 0, segments = 0;
      scan(row, [&](Block) { blocks++; }, [&](Segment) { segments++; });
      s.first_block[row + 1] = blocks, s.first_segment[row + 1] = segments;
    });
    s.first_block[0] = s.first_segment[0] = 0;
    for (int64_t row = 0; row < rows / 2; row++) {
      s.first_block[row + 1] += s.first_block[row];
      s.first_segment[row + 1] += s.first_segment[row];
    }
    parallel(rows / 2, [&](int64_t row, Scratch&) {
      Block* blocks = s.blocks + s.first_block[row];
      Segment* segments = s.segments + s.first_segment[row];
      scan(row, [&](Block block) { *blocks++ = block; }, [&](Segment segment) { *segments++ = segment; });
    });
  }

  // All channels of the important pixels of blocks
  void run_blocks(int64_t l, const Source& in, const Block* blocks, int count, Scratch& scratch) const {
    float* to = map(l) + skip(l);
    if (skip(l) == C) return;
    convolve(in, blocks, count, m.layers[l].full, C - skip(l), scratch, [&](int t, int g, const vec* y) {
      float* corner = to + blocks[t].pixel * C + g * VL;
      for (int i = 0; i < 4; i++)
        if (blocks[t].bits >> OWN[i] & 1) store(corner + (i / 2 * pitch + i % 2) * C, relu(y[i]));
    });
  }

  // The dense channels of the unimportant pixels of a segment; also loads the row that `next` reads for the first time
  void run_segment(int64_t l, const Source& in, const Segment& segment, const Segment& next) const {
    for (int k = -1; k <= SEGMENT; k++) prefetch(in.map + (next.pixel + in.pitch + k) * C, in.groups * VL);
    const Layer& layer = m.layers[l];
    const int n = wide(layer.n_out), taps = layer.n_in ? 9 : 0;
    for_columns(n, [&](auto width, int j) {
      constexpr int N = width.value, M = N == 1 ? SEGMENT : ROWS;
      for (int first = 0; first < SEGMENT; first += M) {
        vec acc[M][N] = {};
        for (int tap = 0; tap < taps; tap++) {
          const float* a = in.map + (segment.pixel + first + (tap / 3 - 1) * pitch + tap % 3 - 1) * C;
          multiply(acc, [&](int i) { return a + i * C; }, columns_of(layer.thin, 9, layer.n_in, tap, j), layer.n_in);
        }
        float* to = map(l) + (segment.pixel + first) * C + j;
        for_rows(acc, M, [&](int i, int k, vec v) {
          if (segment.bits >> (first + i) & 1) store(to + i * C + k * VL, relu(v));
        });
      }
    });
  }

  // Collect all channels of pixels, or the dense ones, into the module's map, and add them up in `sums` (C)
  void collect(int64_t* pixels, int count, bool all, float* sums) const {
    std::fill_n(sums, C, 0.f);
    if (count == 0) return;
    std::fill_n(pixels + count, ROWS - 1, pixels[count - 1]);
    for (int first = 0; first < count; first += ROWS)
      for_columns(C, [&](auto width, int j) {
        constexpr int N = width.value;
        vec acc[ROWS][N];
        fill(acc, m.collect_bias + j);
        for (int64_t l = 0; l < net.n_layers; l++) {
          const Layer& layer = m.layers[l];
          const int channels = all ? C : layer.n_out;
          if (j == 0 && first + ROWS < count)
            for (int i = 0; i < ROWS; i++) prefetch(map(l) + pixels[first + ROWS + i] * C, channels);
          const float* rows[ROWS];
          for (int i = 0; i < ROWS; i++) rows[i] = map(l) + pixels[first + i] * C;
          multiply(acc, [&](int i) { return rows[i]; }, columns_of(layer.collect, 1, C, 0, j), channels);
        }
        vec sum[N] = {};
        for_rows(acc, count - first, [&](int i, int k, vec v) {
          store(module + pixels[first + i] * C + j + k * VL, v);
          sum[k] += v;
        });
        for (int k = 0; k < N; k++) store(sums + j + k * VL, load(sums + j + k * VL) + sum[k]);
      });
  }

  void collect_blocks(const Block* blocks, int count, float* sums) const {
    int64_t pixels[4 * TASK + ROWS];
    int n = 0;
    for (int t = 0; t < count; t++)
      for (int i = 0; i < 4; i++)
        if (blocks[t].bits >> OWN[i] & 1) pixels[n++] = blocks[t].pixel + i / 2 * pitch + i % 2;
    collect(pixels, n, true, sums);
  }

  void collect_segments(const Segment* segments, int count, float* sums) const {
    int64_t pixels[SEGMENT * SEGMENT_TASK + ROWS];
    int n = 0;
    for (int t = 0; t < count; t++)
      for (int i = 0; i < SEGMENT; i++)
        if (segments[t].bits >> i & 1) pixels[n++] = segments[t].pixel + i;
    collect(pixels, n, false, sums);
  }

  // Run all layers, a few rows at a time, so that a layer finds the outputs of the one before in the cache
  void run_layers() const {
    if (inner.begin == 0) std::fill_n(s.pooled_sums, C, 0.0);
    const int64_t step = divide_up(BAND, half_width);
    for (int64_t end = step; end < rows / 2 + step + net.n_layers; end += step)
      for (int64_t l = 0; l < net.n_layers; l++) {
        // A layer reads one row of blocks more than it writes.
        const Range all = block_rows(l);
        const Range band = {std::max(all.begin, end - step - l), std::min(all.end, end - l)};
        if (band.begin < band.end) run_layer(l, band);
      }
  }

  // Run a layer on rows of blocks; the last one also collects
  void run_layer(int64_t l, Range range) const {
    const bool is_last = l == net.n_layers - 1, has_thin = !skip(l) && m.layers[l].n_out;
    const Source in = l ? Source{map(l - 1), pitch, wide(m.layers[l].n_in) / VL} : Source{features, pitch, GROUPS};
    const Block* blocks = s.blocks + s.first_block[range.begin];
    const Segment* segments = s.segments + s.first_segment[range.begin];
    const int64_t n_blocks = s.first_block[range.end] - s.first_block[range.begin];
    const int64_t n_segments = s.first_segment[range.end] - s.first_segment[range.begin];
    const int64_t block_tasks = divide_up(n_blocks, TASK);
    const int64_t tasks = block_tasks + (has_thin || is_last ? divide_up(n_segments, SEGMENT_TASK) : 0);
    parallel(tasks, [&](int64_t task, Scratch& scratch) {
      if (task < block_tasks) {
        const Block* mine = blocks + task * TASK;
        const int count = std::min<int64_t>(TASK, n_blocks - task * TASK);
        run_blocks(l, in, mine, count, scratch);
        if (is_last) collect_blocks(mine, count, s.sums + task * C);
      } else {
        const int64_t first = (task - block_tasks) * SEGMENT_TASK;
        const int count = std::min<int64_t>(SEGMENT_TASK, n_segments - first);
        if (has_thin)
          for (int i = 0; i < count; i++)
            run_segment(l, in, segments[first + i], segments[first + std::min(i + 1, count - 1)]);
        if (is_last) collect_segments(segments + first, count, s.sums + task * C);
      }
    });
    if (is_last) add_sums(tasks);
  }

  void add_sums(int64_t tasks) const {
    for (int64_t task = 0; task < tasks; task++)
      for (int c = 0; c < C; c++) s.pooled_sums[c] += s.sums[task * C + c];
  }

  // Copy the mask of the inner rows; returns the number of important pixels
  int64_t copy_mask(uint8_t* mask) const {
    int64_t important = 0;
    for (int64_t y = inner.begin; y < inner.end; y++)
      for (int64_t x = 0; x < W; x++) important += mask[y * W + x] = s.mask[at(y - top, x)];
    return important;
  }

  // The products of the layers, with those of pixels that were computed needlessly
  int64_t executed(int64_t important) const {
    const int64_t pixels = (inner.end - inner.begin) * W;
    int64_t products = 0;
    for (int64_t l = 0; l < net.n_layers; l++) {
      const Layer& layer = m.layers[l];
      const Range range = block_rows(l);
      products += (s.first_block[range.end] - s.first_block[range.begin]) * 16 * C * (C - skip(l));
      const int64_t n_segments = s.first_segment[range.end] - s.first_segment[range.begin];
      if (!skip(l)) products += n_segments * SEGMENT * 9 * layer.n_in * wide(layer.n_out);
      products += C * (important * C + (pixels - important) * layer.n_out);
    }
    return m.first ? products + rows / 2 * half_width * (16 * C * (R + skip(0)) + R * (9 * R + TAPS)) : products;
  }
};

}  // namespace

// ---- the functions that native.py calls ----------------------------------------------------------------------------

extern "C" {

// Floats per vector, to which n_out is padded
int64_t smsr_vector() { return VL; }

// Bytes of work memory, from an address on that is a multiple of 64
int64_t smsr_workspace(const Call* call) { return lay_out(*call).bytes; }

// Compute the features of the head
void smsr_head(const Call* call) {
  const Image image(*call);
  image.load_image();
  image.convolve_image(image.s.total);
  image.convolve_map(image.s.total, image.net.head, image.net.head_bias, nullptr, image.s.head);
}

// Run the layers of a module on the rows top...bottom, both even. mask: (height, width), its rows are written.
// counts: the number of important pixels, and the multiply-adds executed
void smsr_module(const Call* call, int64_t index, int64_t top, int64_t bottom, uint8_t* mask, int64_t* counts) {
  const ModuleStrip strip(*call, index, {top, bottom});
  strip.clear_borders();
  strip.make_mask();
  strip.make_lists();
  strip.run_layers();
  counts[0] = strip.copy_mask(mask);
  counts[1] = strip.executed(counts[0]);
}

// Add the module to the features, weighted by its attention, and the features to the total; after the last strip
void smsr_attend(const Call* call, int64_t index) {
  const Image image(*call);
  float factors[C];
  image.excite(image.net.modules[index], factors);
  image.attend(index, factors);
}

// Add the network to the upsampled image
void smsr_reconstruct(const Call* call) {
  const Image image(*call);
  const Space& s = image.s;
  float* head = call->keep_head ? s.head : s.module;
  if (!call->keep_head) {
    image.convolve_image(s.features);
    image.convolve_map(s.features, image.net.head, image.net.head_bias, nullptr, head);
  }
  image.convolve_map(s.total, image.net.fuse, image.net.fuse_bias, head, s.features);
  image.add_tail(s.features);
}

}  // extern "C"

// Compiled once for each level; the build defines WRPO_LEVEL as its name and sets the instruction set.
//
// Every element of a tile of c, kRows x kColumns of them, stays in a register while a tile of a passes, an element at a
// time, and a panel of b, a vector at a time (Goto and van de Geijn, doi:10.1145/1356052.1356053):
//
//     for columns of c, `columns` at a time
//       for depth, `depth` at a time                    a block of b, in panels: half of L2
//         for rows of c, kRows at a time                a tile of a: L1
//           for the panels of the block                 a tile of c: registers
//
// Elements of a are read where they are if they are float32 and those of a row lie side by side; elsewhere kTall rows
// are copied at a time. 16-bit matrices become float32 on the way into a block.
#include "product.h"

#include <memory>
#include <new>

#include "../rowmath.h"
#include "tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <unistd.h>
#endif

namespace wrpo::WRPO_LEVEL {
namespace {

typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

constexpr int kWidth = kVectorBytes / int(sizeof(float));
constexpr int kVectors = 3;  // of a row of a tile
constexpr int kColumns = kVectors * kWidth;
#if defined(__AVX512F__)
constexpr int kRows = 8;  // 24 accumulators, 3 vectors of b and an element of a: 28 of 32 registers
#else
constexpr int kRows = 4;  // 12, 3 and 1: 16 of 16
#endif
constexpr int64_t kTall = 96;  // rows of a that are copied at a time
constexpr int64_t kDeepest = 640;  // of a tile of a: 20 KiB
constexpr int64_t kFloatsInL3 = 1 << 20;  // of a block of b beside packed rows of a
constexpr double kAlone = 4e6;  // flops that a further thread is not worth

// a b + c, rounded once where there is an FMA unit
WRPO_ALWAYS_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return Vector(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return Vector(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

WRPO_ALWAYS_INLINE Vector load_vector(const float* x) { return Vector(*reinterpret_cast<const Unaligned*>(x)); }

WRPO_ALWAYS_INLINE void store_vector(float* x, Vector v) { *reinterpret_cast<Unaligned*>(x) = v; }

int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t pieces_of(int64_t total, int64_t piece) { return (total + piece - 1) / piece; }

// Pieces as large as each other, in multiples of `unit`, none larger than `most`
int64_t even_piece(int64_t total, int64_t most, int64_t unit) {
  return pieces_of(pieces_of(total, pieces_of(total, most)), unit) * unit;
}

// The tile of a: rows `row` apart and elements of a row side by side, or packed, kRows elements of a column after the
// other
struct TileOfA {
  const float* start;
  int64_t row;
  bool is_packed;
};

// c = a b + beta c of `rows` x kColumns
template <int rows, bool is_packed>
void tile(const float* a, int64_t a_row, const float* panel, int64_t depth, float beta, float* c, int64_t c_row) {
  Vector sum[rows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = beta == 0 ? Vector{} : load_vector(c + i * c_row + j * kWidth) * (Vector{} + beta);
  // Three rows to a pointer: what an address can reach by its scale. In an array: of pointers that `?:` chooses from,
  // GCC 12 reads all before it knows which, beyond the matrix (seen by AddressSanitizer).
  const float* from[] = {a, a + (rows > 3 ? 3 * a_row : 0), a + (rows > 6 ? 6 * a_row : 0)};
  for (int64_t k = 0; k < depth; ++k, panel += kColumns) {
    Vector b[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) b[j] = load_vector(panel + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vector x = Vector{} + (is_packed ? from[0][i] : from[i / 3][i % 3 * a_row]);
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(x, b[j], sum[i][j]);
    }
#pragma GCC unroll 3
    for (auto& some : from) some += is_packed ? kRows : 1;
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) store_vector(c + i * c_row + j * kWidth, sum[i][j]);
}

// The same of `rows` <= most
template <int most = kRows>
void tile_of(int rows, TileOfA a, const float* panel, int64_t depth, float beta, float* c, int64_t c_row) {
  if constexpr (most > 1)
    if (rows < most) return tile_of<most - 1>(rows, a, panel, depth, beta, c, c_row);
  if (a.is_packed)
    tile<most, true>(a.start, a.row, panel, depth, beta, c, c_row);
  else
    tile<most, false>(a.start, a.row, panel, depth, beta, c, c_row);
}

// The same of `columns` <= kColumns: the panel has zeros where c has no column
void tile_at_edge(int rows, int columns, TileOfA a, const float* panel, int64_t depth, float beta, float* c,
                  int64_t c_row) {
  if (columns == kColumns) return tile_of(rows, a, panel, depth, beta, c, c_row);
  float whole[kRows * kColumns];
  if (beta != 0)
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < kColumns; ++j) whole[i * kColumns + j] = j < columns ? c[i * c_row + j] : 0.f;
  tile_of(rows, a, panel, depth, beta, whole, kColumns);
  for (int i = 0; i < rows; ++i) std::memcpy(c + i * c_row, whole + i * kColumns, size_t(columns) * sizeof(float));
}

struct Free {
  void operator()(float* block) const { ::operator delete(block, std::align_val_t(4096)); }
};

// Kept from call to call, since new pages take longer than what is done in them.
struct Room {
  std::unique_ptr<float, Free> block;
  int64_t size = 0;

  float* floats(int64_t count) {
    if (count > size) {
      block.reset(static_cast<float*>(::operator new(size_t(count) * sizeof(float), std::align_val_t(4096))));
      size = count;
    }
    return block.get();
  }
};

thread_local Room block_of_b, block_of_a, wide_columns;

// Calls f with the matrix's elements from (i, j) on, as what they are.
template <class F>
void with_elements(const Matrix& x, int64_t i, int64_t j, F f) {
  const int64_t first = i * x.row + j * x.col;
  if (x.dtype == Dtype::float32) return f(static_cast<const float*>(x.start) + first);
  if (x.dtype == Dtype::bfloat16) return f(static_cast<const BFloat16*>(x.start) + first);
  return f(static_cast<const Float16*>(x.start) + first);
}

template <class T>
WRPO_ALWAYS_INLINE void widen(const T* from, int64_t count, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}

// panel[k * kColumns + j] = b[k, j], 0 for j >= columns

template <class T>
void pack_rows(const T* b, int64_t b_row, int64_t depth, int columns, float* panel) {
  for (int64_t k = 0; k < depth; ++k, b += b_row, panel += kColumns)
    if (columns == kColumns)
      widen(b, kColumns, panel);
    else
      for (int j = 0; j < kColumns; ++j) panel[j] = j < columns ? load(b[j]) : 0.f;
}

void pack_columns(const float* b, int64_t b_col, int64_t depth, int columns, float* panel) {
  const int64_t whole = depth / kWidth * kWidth;
  for (int j = 0; j < kColumns; j += kWidth) {
    const int width = int(lesser(columns - j, kWidth));
    const float* some = b + j * b_col;
    for (int64_t k = 0; k < whole && width == kWidth; k += kWidth)
      turn_tile(some + k, b_col, panel + k * kColumns + j, kColumns);
    for (int64_t k = width == kWidth ? whole : 0; k < depth; ++k)
      for (int i = 0; i < kWidth; ++i) panel[k * kColumns + j + i] = i < width ? some[i * b_col + k] : 0.f;
  }
}

template <class T>
void pack_columns(const T* b, int64_t b_col, int64_t depth, int columns, float* panel) {
  float* wide = wide_columns.floats(kColumns * kDeepest);
  for (int j = 0; j < columns; ++j) widen(b + j * b_col, depth, wide + j * depth);
  pack_columns(wide, depth, depth, columns, panel);
}

void pack_panel(const Matrix& b, int64_t k, int64_t j, int64_t depth, int columns, float* panel) {
  with_elements(b, k, j, [&](auto* some) {
    if (b.col == 1)
      pack_rows(some, b.row, depth, columns, panel);
    else
      pack_columns(some, b.col, depth, columns, panel);
  });
}

// Rows of a whose columns lie side by side, in tiles. A column after the other: where a_col is a multiple of the
// caches' span, as in a [n, 49152] matrix, the lines of a tile would evict each other before they are used up.
template <class T>
void pack_tiles(const T* a, int64_t a_col, int64_t rows, int64_t depth, float* packed) {
  const int64_t whole = rows / kRows * kRows;
  for (int64_t k = 0; k < depth; ++k, a += a_col, packed += kRows) {
    for (int64_t i = 0; i < whole; i += kRows) widen(a + i, kRows, packed + i * depth);
    for (int64_t i = whole; i < rows; ++i) packed[whole * depth + i - whole] = load(a[i]);
  }
}

// Rows [i, i + rows) of a from column k on, `row` apart, or in tiles
struct SomeOfA {
  const float* start;
  int64_t row;
  bool is_packed;

  TileOfA at(int64_t m, int64_t depth) const { return TileOfA{start + m * (is_packed ? depth : row), row, is_packed}; }
};

bool is_read_in_place(const Matrix& a) { return a.col == 1 && a.dtype == Dtype::float32; }

SomeOfA some_of(const Matrix& a, int64_t i, int64_t k, int64_t rows, int64_t depth) {
  if (is_read_in_place(a)) return {static_cast<const float*>(a.start) + i * a.row + k, a.row, false};
  float* copy = block_of_a.floats(kTall * kDeepest);
  with_elements(a, i, k, [&](auto* some) {
    if (a.col != 1) return pack_tiles(some, a.col, rows, depth, copy);
    for (int64_t m = 0; m < rows; ++m) widen(some + m * a.row, depth, copy + m * depth);
  });
  return {copy, depth, a.col != 1};
}

int64_t floats_in_l2() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = lesser(sysconf(_SC_LEVEL2_CACHE_SIZE), 2 << 20);
#else
  static const int64_t bytes = 0;
#endif
  return (bytes < (256 << 10) ? 512 << 10 : bytes) / 2 / int64_t(sizeof(float));
}

struct Part {
  int64_t row, rows, column, columns;  // of c
};

struct Blocks {
  int64_t columns, depth;
};

// With the least traffic: c is read and written once for each piece of the depth, a once for each block of columns.
Blocks blocks_of(const Part& part, int64_t k, int64_t floats) {
  Blocks best{kColumns, lesser(k, kDeepest)};
  double least = -1;
  for (int64_t columns = kColumns; columns * 64 <= floats; columns += kColumns) {
    const int64_t deepest = lesser(kDeepest, floats / columns);
    const double traffic = 2. * double(part.rows * part.columns) * double(pieces_of(k, deepest)) +
                           double(part.rows * k) * double(pieces_of(part.columns, columns));
    if (least < 0 || traffic < least)
      least = traffic, best = {even_piece(part.columns, columns, kColumns), even_piece(k, deepest, 1)};
    if (columns >= part.columns) break;
  }
  return best;
}

// The tiles of a block: rows of a that are read where they are pass all panels one after the other, each from L1;
// packed ones, in L2, pass a panel together, which then comes from L3 once.
template <class F>
void each_tile(int64_t rows, int64_t columns, bool is_packed, F f) {
  if (is_packed)
    for (int64_t n = 0; n < columns; n += kColumns)
      for (int64_t m = 0; m < rows; m += kRows) f(m, n);
  else
    for (int64_t m = 0; m < rows; m += kRows)
      for (int64_t n = 0; n < columns; n += kColumns) f(m, n);
}

void multiply(const Product& p, const Part& part) {
  const bool is_packed = p.a.col != 1;
  const Blocks blocks = blocks_of(part, p.k, is_packed ? kFloatsInL3 : floats_in_l2());
  const int64_t tall = is_read_in_place(p.a) ? part.rows : kTall;
  float* b = block_of_b.floats(blocks.columns * blocks.depth);
  for (int64_t j = 0; j < part.columns; j += blocks.columns)
    for (int64_t k = 0; k < p.k; k += blocks.depth) {
      const int64_t columns = lesser(blocks.columns, part.columns - j), depth = lesser(blocks.depth, p.k - k);
      const float beta = k == 0 ? p.beta : 1.f;
      const auto width = [&](int64_t n) { return int(lesser(kColumns, columns - n)); };
      for (int64_t n = 0; n < columns; n += kColumns)
        pack_panel(p.b, k, part.column + j + n, depth, width(n), b + n * depth);
      for (int64_t i = 0; i < part.rows; i += tall) {
        const int64_t rows = lesser(tall, part.rows - i);
        const SomeOfA a = some_of(p.a, part.row + i, k, rows, depth);
        float* c = p.c + (part.row + i) * p.c_row + part.column + j;
        each_tile(rows, columns, is_packed, [&](int64_t m, int64_t n) {
          const int height = int(lesser(kRows, rows - m));
          tile_at_edge(height, width(n), a.at(m, depth), b + n * depth, depth, beta, c + m * p.c_row + n, p.c_row);
        });
      }
    }
}

struct Grid {
  int64_t down, across, rows, columns;  // parts of c, and the sides of a part
};

// The fastest part, in steps of a core: it multiplies kWidth * 2 elements in one and packs one; every part packs its
// own block of b.
Grid grid_of(const Product& p, int threads) {
  Grid best{};
  double least = -1;
  for (int64_t across = 1; across <= threads; ++across) {
    const int64_t down = threads / across;
    const int64_t rows = pieces_of(pieces_of(p.m, down), kRows) * kRows;
    const int64_t columns = pieces_of(pieces_of(p.n, across), kColumns) * kColumns;
    const double share_of_a = is_read_in_place(p.a) ? 0.25 : 1.;
    const double steps = double(rows) * double(columns) / (2 * kWidth) + double(columns) + share_of_a * double(rows);
    if (least < 0 || steps < least)
      least = steps, best = {pieces_of(p.m, rows), pieces_of(p.n, columns), rows, columns};
  }
  return best;
}

}  // namespace

void product(const Product& p) {
  const double flops = 2. * double(p.m) * double(p.n) * double(p.k);
  const int threads = flops < kAlone * p.threads ? int(flops / kAlone) : p.threads;
  const Grid grid = grid_of(p, threads < 1 ? 1 : threads);
  const int64_t parts = grid.down * grid.across;
#pragma omp parallel for schedule(static) num_threads(int(parts)) if (parts > 1)
  for (int64_t t = 0; t < parts; ++t) {
    const int64_t row = t / grid.across * grid.rows, column = t % grid.across * grid.columns;
    multiply(p, {row, lesser(grid.rows, p.m - row), column, lesser(grid.columns, p.n - column)});
  }
}

}  // namespace wrpo::WRPO_LEVEL

// Compiled once for each level; the build defines WRPO_LEVEL as its name and sets the instruction set.
//
// A tile of c, kRows x kColumns, stays in registers while a tile of a passes, an element at a time, and a panel of b, a
// vector at a time (Goto and van de Geijn, doi:10.1145/1356052.1356053):
//
//     for some columns of c
//       for each piece of the depth k                   a block of b, in panels: half of L2
//         for each tile of rows                         a tile of a: L1
//           for each panel of the block                 a tile of c: registers
//
// Where elements of a column of a lie side by side kTall rows are packed into L2, the block of b lies in L3, and the
// last two loops change places. 16-bit matrices become float32 on the way into a block.
//
// Each piece of the depth is summed from zero and then added to c: an element's error grows like the roots of kDeepest
// and of k / kDeepest, not like that of k. The pieces follow from k alone, so that its bits do not depend on the
// threads.
#include "product.h"

#include "packing.h"

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

constexpr int64_t kFloatsInL3 = 1 << 19;  // of a block of b beside packed rows of a, 2 MiB
constexpr double kAlone = 4e6;  // flops that a further thread is not worth

// a b + c, rounded once where there is an FMA unit
WRPO_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return Vector(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return Vector(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

WRPO_INLINE Vector broadcast(float x) { return x - Vector{}; }  // + would make 0 of -0, and cost an addition

WRPO_INLINE Vector load_vector(const float* x) { return Vector(*reinterpret_cast<const Unaligned*>(x)); }

WRPO_INLINE void store_vector(float* x, Vector v) { *reinterpret_cast<Unaligned*>(x) = v; }

// Pieces as large as each other, in multiples of `unit`, none larger than `most`
int64_t even_piece(int64_t total, int64_t most, int64_t unit) {
  return pieces_of(pieces_of(total, pieces_of(total, most)), unit) * unit;
}

// c = a b + beta c of `rows` x kColumns
template <int rows, bool is_packed>
void tile(const float* a, int64_t a_row, const float* panel, int64_t depth, float beta, float* c, int64_t c_row) {
  Vector sum[rows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) sum[i][j] = Vector{};
  // Three rows to a pointer: what an address can reach by its scale. In an array: of pointers that `?:` chooses from,
  // GCC 12 reads all before it knows which, beyond the matrix (seen by AddressSanitizer).
  const float* from[] = {a, a + (rows > 3 ? 3 * a_row : 0), a + (rows > 6 ? 6 * a_row : 0)};
  for (int64_t k = 0; k < depth; ++k, panel += kColumns) {
    Vector b[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) b[j] = load_vector(panel + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vector x = broadcast(is_packed ? from[0][i] : from[i / 3][i % 3 * a_row]);
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(x, b[j], sum[i][j]);
    }
#pragma GCC unroll 3
    for (auto& some : from) some += is_packed ? kRows : 1;
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * c_row + j * kWidth;
      store_vector(to, beta == 0 ? sum[i][j] : multiply_add(broadcast(beta), load_vector(to), sum[i][j]));
    }
}

// The same of `rows` <= most
template <int most = kRows>
void tile_of(int rows, RowsOfA a, const float* panel, int64_t depth, float beta, float* c, int64_t c_row) {
  if constexpr (most > 1)
    if (rows < most) return tile_of<most - 1>(rows, a, panel, depth, beta, c, c_row);
  if (a.is_packed)
    tile<most, true>(a.start, a.row, panel, depth, beta, c, c_row);
  else
    tile<most, false>(a.start, a.row, panel, depth, beta, c, c_row);
}

// The same of `columns` <= kColumns: the panel has zeros where c has no column
void tile_at_edge(int rows, int columns, RowsOfA a, const float* panel, int64_t depth, float beta, float* c,
                  int64_t c_row) {
  if (columns == kColumns) return tile_of(rows, a, panel, depth, beta, c, c_row);
  float whole[kRows * kColumns];
  if (beta != 0)
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < kColumns; ++j) whole[i * kColumns + j] = j < columns ? c[i * c_row + j] : 0.f;
  tile_of(rows, a, panel, depth, beta, whole, kColumns);
  for (int i = 0; i < rows; ++i) std::memcpy(c + i * c_row, whole + i * kColumns, size_t(columns) * sizeof(float));
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
  const int64_t deep = even_piece(p.k, kDeepest, 1), tall = is_read_in_place(p.a) ? part.rows : kTall;
  const int64_t most = (is_packed ? kFloatsInL3 : floats_in_l2()) / (deep * kColumns) * kColumns;
  const int64_t wide = even_piece(part.columns, most, kColumns);
  float* b = block_of_b.floats(wide * deep);
  for (int64_t j = 0; j < part.columns; j += wide)
    for (int64_t k = 0; k < p.k; k += deep) {
      const int64_t columns = lesser(wide, part.columns - j), depth = lesser(deep, p.k - k);
      const float beta = k == 0 ? p.beta : 1.f;
      const auto width = [&](int64_t n) { return int(lesser(kColumns, columns - n)); };
      for (int64_t n = 0; n < columns; n += kColumns)
        pack_panel(p.b, k, part.column + j + n, depth, width(n), b + n * depth);
      for (int64_t i = 0; i < part.rows; i += tall) {
        const int64_t rows = lesser(tall, part.rows - i);
        const RowsOfA a = rows_of(p.a, part.row + i, k, rows, depth);
        float* c = p.c + (part.row + i) * p.c_row + part.column + j;
        each_tile(rows, columns, is_packed, [&](int64_t m, int64_t n) {
          const int height = int(lesser(kRows, rows - m));
          tile_at_edge(height, width(n), a.from(m, depth), b + n * depth, depth, beta, c + m * p.c_row + n, p.c_row);
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
  bool has_room = true;
  // All threads, even if some have nothing to do: OpenMP ends those that a smaller team leaves out, with their memory.
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parts > 1)
  for (int64_t t = 0; t < parts; ++t) {
    const int64_t row = t / grid.across * grid.rows, column = t % grid.across * grid.columns;
    try {
      multiply(p, {row, lesser(grid.rows, p.m - row), column, lesser(grid.columns, p.n - column)});
    } catch (const std::bad_alloc&) {  // must not leave the parallel region
#pragma omp atomic write
      has_room = false;
    }
  }
  if (!has_room) throw std::bad_alloc();
}

}  // namespace wrpo::WRPO_LEVEL

// LoRA linear, forward and backward. The base product x W^T (dy W) is torch's BLAS's, that of
// product.h or, for a few rows, that of few.h: lora/plan.h decides. Everything else is one pass
// over the rows each way; behind product.h even y += h B^T and dx += dh A are part of that product.
//
// A task is one segment of rows (lora/plan.h), walked in blocks of at most 96 rows; the wide sides
// are walked in tiles of 256 columns:
//
//   forward    h[96, r]   +=  keep(x[96, 256]) A[r, 256]^T         x read once
//              y[96, 256] +=  h[96, r] B[256, r]^T                 y updated in place
//   backward   dh[96, r]  +=  dy[96, 256] B[256, r]                dy read once, for dh and for dB
//              dB[256, r] +=  dy[96, 256]^T h[96, r]
//              dA[r, 256] +=  dh[96, r]^T keep(x[96, 256])         one random mask for dA and dx
//              dx[96, 256] += keep(dh[96, r] A[r, 256])
//
// Every product is the micro-GEMM of simd/gemm.h on float tiles. float32 rows are used where they
// lie; bfloat16 and float16 ones become floats tile by tile, so no float32 copy of x, y or dy
// exists. A^T and B^T tiles are transposed in registers on the way to L1.
//
// Memory: for each thread 2 tiles of 96 x 256 floats and one of masks (L2), one panel of 256 x r,
// three of 96 x r. Backward also keeps a partial dA and dB for each segment, at most 32 for each
// adapter; they are added in the order of rows. With one segment the sums go straight to dA and dB.
//
// Numerics: float32 sums, tile by tile of 256 columns, so that no chain is longer; y and dx are
// rounded once more after the base product's own rounding. One row of h, dh, y and dx depends on no
// other row.
//
// Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).
#include <memory>

#include "guard.h"
#include "lora/cpu/few.h"
#include "lora/cpu/product.h"
#include "lora/cpu/tiles.h"
#include "lora/params.h"
#include "lora/plan.h"
#include "simd/gemm.h"

namespace flashkern::FK_ISA {
namespace {

constexpr int64_t kCols = kLoraBlockCols;

// What one thread works in.
struct Scratch {
  float* tile;
  float* product;
  uint32_t* mask;
  float* panel;
  float* h;
  float* dh;
  float* part;  // of h or dh, from one tile of columns

  static int64_t floats(int64_t rows, int64_t rank) {
    return 3 * rows * kCols + kCols * rank + 3 * rows * rank + 7 * kGuardFloats;
  }
  Scratch(float* base, int64_t rows, int64_t rank)
      : tile(take(base, rows * kCols)),
        product(take(base, rows * kCols)),
        mask(reinterpret_cast<uint32_t*>(take(base, rows * kCols))),
        panel(take(base, kCols * rank)),
        h(take(base, rows * rank)),
        dh(take(base, rows * rank)),
        part(take(base, rows * rank)) {}

 private:
  static float* take(float*& next, int64_t floats) {
    float* piece = next;
    next += floats + kGuardFloats;
    forbid(piece + floats, kGuardFloats);
    return piece;
  }
};

struct Workspace {
  int64_t rows, rank, pitch;
  std::unique_ptr<float[]> memory;

  Workspace(const LoraPlan& plan, int64_t rank, const Threads& threads)
      : rows(plan.block_rows), rank(rank), pitch(Scratch::floats(rows, rank)) {
    const int64_t count = std::min<int64_t>(threads.count, plan.segments.size());
    memory.reset(new float[std::max<int64_t>(count, 1) * pitch]);
  }
  Scratch of(int thread) const { return {memory.get() + thread * pitch, rows, rank}; }
};

Rows block_rows(const LoraPlan& plan, int64_t begin, int64_t end) {
  const int64_t count = std::min(end - begin, kLoraBlockRows);
  if (plan.order.empty()) return {nullptr, begin, count};
  return {plan.order.data() + begin, 0, count};
}

// A tile of x with zeros where dropout drops; the masks are in scratch already.
Tile read_kept(const LoraDropout& dropout, const Matrix& x, const Rows& rows, int64_t col,
               int64_t cols, const Scratch& s) {
  if (dropout.threshold == 0) return read_tile(x, rows, col, cols, s.tile);
  const Tile tile = copy_tile(x, rows, col, cols, s.tile);
  for (int64_t i = 0; i < rows.count; ++i) {
    float* row = s.tile + i * cols;
    const uint32_t* mask = s.mask + i * kCols;
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) store(row + j, keep_lanes(load(row + j), mask + j));
    for (; j < cols; ++j) row[j] = mask[j] ? row[j] : 0.f;
  }
  return tile;
}

// x += keep(product), both (rows, cols).
template <class T>
void add_kept(T* x, const float* product, const uint32_t* mask, int64_t cols) {
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, cols - j));
    VecF add = n == kLanes ? load(product + j) : load_partial(product + j, n);
    if (mask != nullptr) add = keep_lanes(add, mask + j);
    if (n == kLanes) {
      store(x + j, load(x + j) + add);
    } else {
      store_partial(x + j, load_partial(x + j, n) + add, n);
    }
  }
}

void scale_rows(float* x, int64_t n, float scale) {
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

// Rows of h or dh from the whole to a block, and back.
void gather_low(const Rows& rows, int64_t rank, const float* whole, float* block) {
  for (int64_t i = 0; i < rows.count; ++i) {
    std::memcpy(block + i * rank, whole + rows[i] * rank, rank * sizeof(float));
  }
}
void scatter_low(const Rows& rows, int64_t rank, const float* block, float* whole) {
  for (int64_t i = 0; i < rows.count; ++i) {
    std::memcpy(whole + rows[i] * rank, block + i * rank, rank * sizeof(float));
  }
}

// ---- forward ----

void shrink(const LoraForward& p, int64_t adapter, const Rows& rows, const Scratch& s) {
  const int64_t rank = p.adapters.rank;
  const Matrix x{p.dtype, p.x, p.x_row}, a{p.adapters.dtype, p.adapters.a, p.in};
  std::memset(s.h, 0, rows.count * rank * sizeof(float));
  for (int64_t col = 0; col < p.in; col += kCols) {
    const int64_t cols = std::min(kCols, p.in - col);
    if (p.dropout.threshold) keep_tile(p.dropout, rows, col, cols, s.mask, kCols);
    const Tile tile = read_kept(p.dropout, x, rows, col, cols, s);
    const Tile at = transposed_tile(a, adapter * rank, rank, col, cols, s.panel);
    gemm<false>(rows.count, rank, cols, {tile.data, tile.row, 1, at.data, at.row, s.part, rank});
    add_kept(s.h, s.part, nullptr, rows.count * rank);
  }
  scale_rows(s.h, rows.count * rank, static_cast<float>(p.adapters.scale[adapter]));
}

void expand(const LoraForward& p, int64_t adapter, const Rows& rows, const Scratch& s) {
  const int64_t rank = p.adapters.rank;
  const Matrix y{p.dtype, p.y, p.out}, b{p.adapters.dtype, p.adapters.b, rank};
  const bool direct = in_place(y, rows);
  for (int64_t col = 0; col < p.out; col += kCols) {
    const int64_t cols = std::min(kCols, p.out - col);
    const Tile bt = transposed_tile(b, adapter * p.out + col, cols, 0, rank, s.panel);
    float* to = direct ? static_cast<float*>(p.y) + rows[0] * p.out + col : s.tile;
    if (!direct) copy_tile(y, rows, col, cols, s.tile);
    gemm<true>(rows.count, cols, rank, {s.h, rank, 1, bt.data, bt.row, to, direct ? p.out : cols});
    if (!direct) write_tile(y, rows, col, cols, s.tile);
  }
}

// ---- backward ----

// dh and this block's part of dB, from one reading of dy.
void backward_out(const LoraBackward& p, int64_t adapter, const Rows& rows, const Scratch& s,
                  float* db, bool first) {
  const int64_t rank = p.adapters.rank;
  const Matrix dy{p.dtype, p.dy, p.dy_row}, b{p.adapters.dtype, p.adapters.b, rank};
  gather_low(rows, rank, static_cast<const float*>(p.h), s.h);
  std::memset(s.dh, 0, rows.count * rank * sizeof(float));
  for (int64_t col = 0; col < p.out; col += kCols) {
    const int64_t cols = std::min(kCols, p.out - col);
    const Tile g = read_tile(dy, rows, col, cols, s.tile);
    if (p.da || p.dx) {
      const Tile bw = read_tile(b, {nullptr, adapter * p.out + col, cols}, 0, rank, s.panel);
      gemm<false>(rows.count, rank, cols, {g.data, g.row, 1, bw.data, bw.row, s.part, rank});
      add_kept(s.dh, s.part, nullptr, rows.count * rank);
    }
    if (db == nullptr) continue;
    const GemmOperands dbt{g.data, 1, g.row, s.h, rank, db + col * rank, rank};
    first ? gemm<false>(cols, rank, rows.count, dbt) : gemm<true>(cols, rank, rows.count, dbt);
  }
  scale_rows(s.dh, rows.count * rank, static_cast<float>(p.adapters.scale[adapter]));
}

void add_to_dx(const LoraBackward& p, int64_t adapter, const Rows& rows, int64_t col, int64_t cols,
               const Scratch& s) {
  const int64_t rank = p.adapters.rank;
  const bool dropout = p.dropout.threshold != 0;
  const Matrix dx{p.dtype, p.dx, p.in}, a{p.adapters.dtype, p.adapters.a, p.in};
  const Tile aw = read_tile(a, {nullptr, adapter * rank, rank}, col, cols, s.panel);
  if (in_place(dx, rows) && !dropout) {
    float* to = static_cast<float*>(p.dx) + rows[0] * p.in + col;
    return gemm<true>(rows.count, cols, rank, {s.dh, rank, 1, aw.data, aw.row, to, p.in});
  }
  gemm<false>(rows.count, cols, rank, {s.dh, rank, 1, aw.data, aw.row, s.product, cols});
  for_dtype(p.dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(p.dx);
    for (int64_t i = 0; i < rows.count; ++i) {
      add_kept(data + rows[i] * p.in + col, s.product + i * cols,
               dropout ? s.mask + i * kCols : nullptr, cols);
    }
  });
}

// This block's part of dA and, where `dx`, of dx.
void backward_in(const LoraBackward& p, int64_t adapter, const Rows& rows, const Scratch& s,
                 float* da, bool dx, bool first) {
  const int64_t rank = p.adapters.rank;
  const Matrix x{p.dtype, p.x, p.x_row};
  for (int64_t col = 0; col < p.in; col += kCols) {
    const int64_t cols = std::min(kCols, p.in - col);
    if (p.dropout.threshold) keep_tile(p.dropout, rows, col, cols, s.mask, kCols);
    if (da != nullptr) {
      const Tile tile = read_kept(p.dropout, x, rows, col, cols, s);
      const GemmOperands part{s.dh, 1, rank, tile.data, tile.row, da + col, p.in};
      first ? gemm<false>(rank, cols, rows.count, part) : gemm<true>(rank, cols, rows.count, part);
    }
    if (dx) add_to_dx(p, adapter, rows, col, cols, s);
  }
}

// ---- sums over segments ----

// One gradient (adapters, size): a part for each segment, or the gradient itself where an adapter
// has one segment and float32 needs no rounding.
struct Parts {
  void* out;
  int64_t size;
  DType dtype;
  const LoraPlan& plan;
  std::unique_ptr<float[]> memory;

  Parts(void* out, int64_t size, DType dtype, const LoraPlan& plan)
      : out(out), size(size), dtype(dtype), plan(plan) {
    bool needed = false;
    for (const LoraSegment& segment : plan.segments) needed |= !direct(segment.adapter);
    if (out != nullptr && needed) memory.reset(new float[plan.segments.size() * size]);
  }
  int64_t segments(int64_t adapter) const { return plan.first[adapter + 1] - plan.first[adapter]; }
  bool direct(int64_t adapter) const { return dtype == DType::kFloat32 && segments(adapter) == 1; }

  float* of(int64_t segment) const {
    if (out == nullptr) return nullptr;
    const int64_t adapter = plan.segments[segment].adapter;
    if (direct(adapter)) return static_cast<float*>(out) + adapter * size;
    return memory.get() + segment * size;
  }

  void add(int64_t adapter, int64_t begin, int64_t end) const {
    if (out == nullptr || direct(adapter)) return;
    const int64_t first = plan.first[adapter], count = segments(adapter);
    float sum[kCols];
    for (int64_t i = begin; i < end; i += kCols) {
      const int64_t n = std::min(kCols, end - i);
      std::memset(sum, 0, sizeof sum);
      for (int64_t k = first; k < first + count; ++k) {
        add_kept(sum, memory.get() + k * size + i, nullptr, n);
      }
      for_dtype(dtype, [&](auto* type) {
        narrow_row(sum, n, static_cast<decltype(type)>(out) + adapter * size + i);
      });
    }
  }
};

void add_parts(const Parts& parts, int64_t adapters, const Threads& threads) {
  if (parts.out == nullptr) return;
  constexpr int64_t kPiece = 16 * kCols;
  const int64_t pieces = (parts.size + kPiece - 1) / kPiece;
  threads.run(adapters * pieces, [&](int64_t task, int) {
    const int64_t begin = task % pieces * kPiece;
    parts.add(task / pieces, begin, std::min(parts.size, begin + kPiece));
  });
}

}  // namespace

void lora_forward(const LoraForward& p, const Threads& threads) {
  const LoraAdapters& ad = p.adapters;
  const bool alone = ad.ids == nullptr;
  if (p.base == LoraBase::kFew && alone) return few_rows_forward(p, threads);

  const LinearSum product{{{{p.dtype, p.x, p.x_row}, {p.dtype, p.weight, p.in}, p.in},
                           {{DType::kFloat32, p.h, ad.rank}, {ad.dtype, ad.b, ad.rank}, ad.rank}},
                          alone ? 2 : 1,
                          true,
                          p.rows,
                          p.out,
                          p.bias,
                          p.dtype,
                          p.y};
  const bool joint = p.base == LoraBase::kTiles && alone;
  if (p.base == LoraBase::kFew) few_rows_base(p, threads);
  if (p.base == LoraBase::kTiles && !alone) run_product(product, threads);

  const LoraPlan plan = lora_plan(p.rows, ad.count, ad.ids);
  const Workspace workspace(plan, ad.rank, threads);
  if (!alone) std::memset(p.h, 0, p.rows * ad.rank * sizeof(float));
  threads.run(static_cast<int64_t>(plan.segments.size()), [&](int64_t task, int thread) {
    const LoraSegment& segment = plan.segments[task];
    const Scratch s = workspace.of(thread);
    for (int64_t i = segment.begin; i < segment.end; i += kLoraBlockRows) {
      const Rows rows = block_rows(plan, i, segment.end);
      shrink(p, segment.adapter, rows, s);
      scatter_low(rows, ad.rank, s.h, static_cast<float*>(p.h));
      if (!joint) expand(p, segment.adapter, rows, s);
    }
  });
  if (joint) run_product(product, threads);
}

void lora_backward(const LoraBackward& p, const Threads& threads) {
  const LoraAdapters& ad = p.adapters;
  const bool own = p.base == LoraBase::kTiles && p.dx != nullptr;
  const bool joint = own && ad.ids == nullptr && p.dropout.threshold == 0;
  const std::unique_ptr<float[]> dh(new float[joint ? p.rows * ad.rank : 1]);
  const LinearSum product{{{{p.dtype, p.dy, p.dy_row}, {p.dtype, p.weight, p.in}, p.out},
                           {{DType::kFloat32, dh.get(), ad.rank}, {ad.dtype, ad.a, p.in}, ad.rank}},
                          joint ? 2 : 1,
                          false,
                          p.rows,
                          p.in,
                          nullptr,
                          p.dtype,
                          p.dx};
  if (own && !joint) run_product(product, threads);

  const LoraPlan plan = lora_plan(p.rows, ad.count, ad.ids);
  const Workspace workspace(plan, ad.rank, threads);
  const Parts da(p.da, ad.rank * p.in, ad.dtype, plan), db(p.db, ad.rank * p.out, ad.dtype, plan);
  const bool add_dx = p.dx != nullptr && !joint;
  threads.run(static_cast<int64_t>(plan.segments.size()), [&](int64_t task, int thread) {
    const LoraSegment& segment = plan.segments[task];
    const Scratch s = workspace.of(thread);
    for (int64_t i = segment.begin; i < segment.end; i += kLoraBlockRows) {
      const Rows rows = block_rows(plan, i, segment.end);
      const bool first = i == segment.begin;
      backward_out(p, segment.adapter, rows, s, db.of(task), first);
      if (joint) scatter_low(rows, ad.rank, s.dh, dh.get());
      if (p.da || add_dx) backward_in(p, segment.adapter, rows, s, da.of(task), add_dx, first);
    }
  });
  add_parts(da, ad.count, threads);
  add_parts(db, ad.count, threads);
  if (joint) run_product(product, threads);
}

}  // namespace flashkern::FK_ISA

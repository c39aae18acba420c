// LoRA linear in float64, for gradcheck and for reference: plain loops, one row after the other.
#include <cmath>

#include "dropout.h"
#include "lora/params.h"

namespace flashkern::FK_ISA {
namespace {

struct Pointers {
  const double* a;
  const double* b;
  double scale;
};

int64_t adapter_of(const LoraAdapters& adapters, int64_t row) {
  return adapters.ids == nullptr ? 0 : adapters.ids[row];
}

Pointers pointers(const LoraAdapters& adapters, int64_t n, int64_t in, int64_t out) {
  return {static_cast<const double*>(adapters.a) + n * adapters.rank * in,
          static_cast<const double*>(adapters.b) + n * adapters.rank * out, adapters.scale[n]};
}

bool keep(const LoraDropout& dropout, int64_t row, int64_t col) {
  if (dropout.threshold == 0) return true;
  const Philox4 words =
      philox(*dropout.seed, static_cast<uint32_t>(col / 4), static_cast<uint32_t>(row), 0, 0);
  return words.word[col % 4] >= dropout.threshold;
}

}  // namespace

void lora_forward_plain(const LoraForward& p, const Threads& threads) {
  const int64_t rank = p.adapters.rank;
  threads.run(p.rows, [&](int64_t row, int) {
    double* h = static_cast<double*>(p.h) + row * rank;
    for (int64_t j = 0; j < rank; ++j) h[j] = 0.0;
    const int64_t n = adapter_of(p.adapters, row);
    if (n < 0) return;
    const Pointers w = pointers(p.adapters, n, p.in, p.out);
    const double* x = static_cast<const double*>(p.x) + row * p.x_row;
    for (int64_t k = 0; k < p.in; ++k) {
      if (!keep(p.dropout, row, k)) continue;
      for (int64_t j = 0; j < rank; ++j) h[j] += w.scale * x[k] * w.a[j * p.in + k];
    }
    double* y = static_cast<double*>(p.y) + row * p.out;
    for (int64_t i = 0; i < p.out; ++i) {
      for (int64_t j = 0; j < rank; ++j) y[i] += h[j] * w.b[i * rank + j];
    }
  });
}

void lora_backward_plain(const LoraBackward& p, const Threads&) {
  const int64_t rank = p.adapters.rank, count = p.adapters.count;
  auto* da = static_cast<double*>(p.da);
  auto* db = static_cast<double*>(p.db);
  for (int64_t i = 0; da && i < count * rank * p.in; ++i) da[i] = 0.0;
  for (int64_t i = 0; db && i < count * rank * p.out; ++i) db[i] = 0.0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t n = adapter_of(p.adapters, row);
    if (n < 0) continue;
    const Pointers w = pointers(p.adapters, n, p.in, p.out);
    const double* x = static_cast<const double*>(p.x) + row * p.x_row;
    const double* dy = static_cast<const double*>(p.dy) + row * p.dy_row;
    const double* h = static_cast<const double*>(p.h) + row * rank;
    for (int64_t j = 0; j < rank; ++j) {
      double dh = 0.0;
      for (int64_t i = 0; i < p.out; ++i) {
        dh += w.scale * dy[i] * w.b[i * rank + j];
        if (db) db[(n * p.out + i) * rank + j] += dy[i] * h[j];
      }
      for (int64_t k = 0; k < p.in; ++k) {
        if (!keep(p.dropout, row, k)) continue;
        if (da) da[(n * rank + j) * p.in + k] += dh * x[k];
        if (p.dx) static_cast<double*>(p.dx)[row * p.in + k] += dh * w.a[j * p.in + k];
      }
    }
  }
}

}  // namespace flashkern::FK_ISA

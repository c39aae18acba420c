// What happens to scores between the product Q K^T and the exponential: softcap, ALiBi, bias,
// masks; and dropout after it. Scores are in units of log2 (log2(e) is folded into every term).
//
// Panel<> variants hold a tile as [key][kPanel]: one vector is one key seen by kLanes rows.
// Each step is a pass of its own over a tile in L1, and plain attention takes none of them.
#pragma once

#include "attention/cpu/rows.h"
#include "attention/softmax.h"
#include "simd/math.h"
#include "simd/philox.h"

namespace flashkern::FK_ISA::attention {

inline VecI load_int(const int32_t* p) {
  VecI x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline VecF as_float(VecI x) { return __builtin_convertvector(x, VecF); }
inline VecF absolute(VecF x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }

// What queries are multiplied by, so that a score needs no scaling of its own.
inline float query_factor(const Problem& p) {
  return static_cast<float>(p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e);
}

inline void apply_softcap(float* s, int64_t count, double softcap) {
  const float factor = static_cast<float>(softcap * kLog2e);
  for (int64_t i = 0; i < count; i += kLanes) store(s + i, tanh(load(s + i)) * factor);
}

inline float alibi_slope(const Problem& p, int64_t b, int64_t h) {
  return p.alibi_slopes[b * p.alibi_batch + h * p.alibi_head] * static_cast<float>(kLog2e);
}

// One element of a bias, in units of log2.
inline float bias_element(const Bias& bias, DType dtype, int64_t at) {
  if (bias.kind == BiasKind::kBool) return static_cast<const bool*>(bias.data)[at] ? 0.f : -kInf;
  float x;
  if (bias.kind == BiasKind::kFloat32 || dtype == DType::kFloat32) {
    x = static_cast<const float*>(bias.data)[at];
  } else if (dtype == DType::kBFloat16) {
    x = to_float(static_cast<const BFloat16*>(bias.data)[at]);
  } else {
    x = to_float(static_cast<const Half*>(bias.data)[at]);
  }
  return x * static_cast<float>(kLog2e);
}

// out[j * step] = the bias of keys [begin, begin + n) for one query.
template <class T>
inline void copy_bias(const T* from, int64_t column, int64_t n, int64_t step, float* out) {
  for (int64_t j = 0; j < n; ++j) {
    if constexpr (std::is_same_v<T, bool>) {
      out[j * step] = from[j * column] ? 0.f : -kInf;
    } else {
      out[j * step] = to_float(from[j * column]) * static_cast<float>(kLog2e);
    }
  }
}

inline void bias_row(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t begin, int64_t n,
                     int64_t step, float* out) {
  const Bias& bias = p.bias;
  const int64_t at = b * bias.batch + h * bias.head + i * bias.row + begin * bias.column;
  const bool wide = bias.kind == BiasKind::kFloat32 || p.dtype == DType::kFloat32;
  if (bias.kind == BiasKind::kBool) {
    copy_bias(static_cast<const bool*>(bias.data) + at, bias.column, n, step, out);
  } else if (wide) {
    copy_bias(static_cast<const float*>(bias.data) + at, bias.column, n, step, out);
  } else if (p.dtype == DType::kBFloat16) {
    copy_bias(static_cast<const BFloat16*>(bias.data) + at, bias.column, n, step, out);
  } else {
    copy_bias(static_cast<const Half*>(bias.data) + at, bias.column, n, step, out);
  }
}

// ---- tiles [key][kPanel] ----

inline void apply_alibi(float* s, int64_t begin, int64_t n, const HeadView& view,
                        const PanelRows& rows) {
  alignas(64) float slope[kPanel];
  for (int lane = 0; lane < kPanel; ++lane) {
    slope[lane] = alibi_slope(*view.problem, rows.batch[lane], rows.head[lane]);
  }
  const int32_t shift = static_cast<int32_t>(view.band.offset - begin);
  for (int64_t v = 0; v < kPanel; v += kLanes) {
    const VecF m = load(slope + v);
    const VecI diagonal = load_int(rows.query + v) + shift;
    for (int64_t j = 0; j < n; ++j) {
      float* at = s + j * kPanel + v;
      const VecF distance = absolute(as_float(diagonal - static_cast<int32_t>(j)));
      store(at, load(at) - m * distance);
    }
  }
}

// `tile` is scratch of the tile's own size: the bias of one row goes down one lane.
inline void apply_bias(float* s, float* tile, int64_t begin, int64_t n, const HeadView& view,
                       const PanelRows& rows) {
  const Problem& p = *view.problem;
  begin += view.sequence.earlier;
  const bool one_batch = p.bias.batch == 0 || p.row_beams == 1;
  const bool one_head = p.bias.head == 0 || p.group() == 1;
  if (p.bias.row == 0 && one_head && one_batch) {  // one row for the whole panel
    bias_row(p, rows.batch[0], rows.head[0], 0, begin, n, 1, tile);
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t v = 0; v < kPanel; v += kLanes) {
        float* at = s + j * kPanel + v;
        store(at, load(at) + tile[j]);
      }
    }
    return;
  }
  for (int lane = 0; lane < kPanel; ++lane) {
    bias_row(p, rows.batch[lane], rows.head[lane], rows.query[lane], begin, n, kPanel, tile + lane);
  }
  for (int64_t i = 0; i < n * kPanel; i += kLanes) store(s + i, load(s + i) + load(tile + i));
}

// Keys that a row's band leaves out become -inf.
inline void apply_band(float* s, int64_t begin, int64_t n, const PanelRows& rows) {
  const VecF hidden = broadcast(-kInf);
  for (int64_t v = 0; v < kPanel; v += kLanes) {
    const VecI first = load_int(rows.first_key + v) - static_cast<int32_t>(begin);
    const VecI end = load_int(rows.end_key + v) - static_cast<int32_t>(begin);
    for (int64_t j = 0; j < n; ++j) {
      float* at = s + j * kPanel + v;
      const int32_t key = static_cast<int32_t>(j);
      store(at, (first > key) | (end <= key) ? hidden : load(at));
    }
  }
}

// x where the random word keeps it. A threshold of 2^32 keeps nothing.
inline VecF keep(VecU word, uint64_t threshold, VecF x) {
  if (threshold >> 32) return VecF{};
  return word >= static_cast<uint32_t>(threshold) ? x : VecF{};
}
inline float keep_factor(double dropout_p) {
  return dropout_p < 1 ? static_cast<float>(1 / (1 - dropout_p)) : 0.f;
}

// Zeros the probabilities that dropout removes. The factor 1 / (1 - p) waits for the end. `begin`
// is a multiple of 4: four keys share a counter.
inline void apply_dropout(float* s, int64_t begin, int64_t n, const HeadView& view,
                          const PanelRows& rows) {
  const Problem& p = *view.problem;
  const uint64_t threshold = dropout_threshold(p.dropout_p);
  const uint32_t batch = static_cast<uint32_t>(view.sequence.batch);
  for (int64_t v = 0; v < kPanel; v += kLanes) {
    const VecU query = reinterpret_cast<VecU>(load_int(rows.query + v));
    const VecU head = reinterpret_cast<VecU>(load_int(rows.head + v));
    for (int64_t j = 0; j < n; j += 4) {
      const VecU quad = VecU{} + static_cast<uint32_t>((begin + j) / 4);
      const PhiloxWords words = philox_words(*p.seed, quad, query, head, VecU{} + batch);
      for (int64_t k = 0; k < 4 && j + k < n; ++k) {
        float* at = s + (j + k) * kPanel + v;
        store(at, keep(words.word[k], threshold, load(at)));
      }
    }
  }
}

}  // namespace flashkern::FK_ISA::attention

// What an attention kernel is told: plain structs, filled by csrc/torch/attention*.cpp. Strides
// count elements; the last dimension of every matrix has stride 1 (bias apart).
#pragma once

#include <cstdint>

#include "types.h"

namespace flashkern::attention {

// A stack of matrices: row r of head h in batch b starts at data + b * batch + h * head + r * row.
// Packed (varlen) tensors have batch = 0: their rows are counted from cu_seqlens[b]. A paged cache
// has `batch` = the stride of a page; page_table says which page holds which keys.
struct Matrix {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// Whether every row starts at a multiple of 16 bytes.
inline bool rows_aligned(const Matrix& m, int64_t element) {
  return (reinterpret_cast<uintptr_t>(m.data) | static_cast<uintptr_t>(m.batch * element) |
          static_cast<uintptr_t>(m.head * element) | static_cast<uintptr_t>(m.row * element)) %
             16 ==
         0;
}

struct Output {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// One number for each row: lse, delta. Rows have stride 1; float32, or float64 beside float64
// inputs.
struct RowValues {
  void* data = nullptr;
  int64_t batch = 0, head = 0;
};

enum class BiasKind { kNone, kBool, kFloat32, kQueryDtype };

struct Bias {
  BiasKind kind = BiasKind::kNone;
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;  // 0 where the bias is broadcast
};

// Where the diagonal lies: row i meets key i + o.
enum class Alignment { kTopLeft = 0, kBottomRight = 1, kOwnLength = 2 };

struct Problem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, kv_heads = 0;
  int64_t seq_q = 0, seq_k = 0;  // of the tensors; with cu_seqlens, the greatest of the batch
  int64_t head_dim = 0, value_dim = 0;

  Matrix query, key, value;

  const int32_t* cu_seqlens_q = nullptr;  // (batch + 1,), both or neither
  const int32_t* cu_seqlens_k = nullptr;
  int64_t packed_q = 0, packed_k = 0;                    // rows of the packed tensors
  const int32_t* kv_lengths = nullptr;                   // (batch,): keys from here on are not seen
  const int32_t* page_table = nullptr;                   // (batch, pages)
  int64_t page_table_row = 0, page_size = 0, pages = 0;  // pages: of the cache

  // Of beam search, where `beams` rows of the batch continue one prompt.
  int64_t beams = 1;
  const int32_t* beam_table = nullptr;  // (batch, tokens): the beam whose row holds a token
  int64_t beam_table_row = 0;
  int64_t shared_keys = 0;  // of the prompt, in front of these: SharedKeys
  const int32_t* shared_lengths = nullptr;

  // Of the part of a prompt's keys alone (shared_part): `batch` counts prompts, the query rows of
  // all their beams are packed together, and so many keys of the beams' own lie behind.
  int64_t row_beams = 1;
  const int32_t* own_lengths = nullptr;  // (batch * row_beams,), the same for all beams of a prompt
  int64_t own_keys = 0;                  // the most that they may be

  Alignment alignment = Alignment::kTopLeft;
  int64_t window_left = -1, window_right = -1;  // -1: unbounded; causal is window_right = 0

  double scale = 1;
  double softcap = 0;  // 0: none
  Bias bias;
  const float* alibi_slopes = nullptr;
  int64_t alibi_batch = 0, alibi_head = 0;
  const float* sinks = nullptr;          // (heads,), for float32 arithmetic
  const double* sinks_double = nullptr;  // the same for float64

  double dropout_p = 0;
  const uint64_t* seed = nullptr;  // where the call runs: a captured graph draws it anew

  FK_HOST_DEVICE int64_t group() const { return heads / kv_heads; }
  // Rows of a query that read the same keys.
  FK_HOST_DEVICE int64_t packed_rows() const { return group() * row_beams; }
};

// A prompt's keys and values, (batch / beams, kv_heads, tokens, dim), read once for all its beams.
struct SharedKeys {
  Matrix key, value;  // without data: there are none
};

struct ForwardParams : Problem {
  SharedKeys shared;
  Output output;
  RowValues lse;
  float* workspace = nullptr;  // of a GPU kernel that splits the keys: gpu::attention_workspace
};

// The call's part of shared keys, as a problem of its own; merged with that of the beams' own keys.
inline ForwardParams shared_part(const ForwardParams& whole) {
  ForwardParams p = whole;
  p.batch = whole.batch / whole.beams;
  p.row_beams = whole.beams;
  p.key = whole.shared.key;
  p.value = whole.shared.value;
  p.seq_k = whole.shared_keys;
  p.kv_lengths = whole.shared_lengths;
  p.own_lengths = whole.kv_lengths;
  p.own_keys = whole.seq_k;
  p.shared = {};
  p.shared_keys = 0;
  p.shared_lengths = p.beam_table = p.page_table = nullptr;
  return p;
}

// The gradient of a bias that wants one: contiguous, float32 (float64 beside float64 inputs), zeros
// on entry. Strides are 0 where the bias is broadcast: those elements sum up.
struct BiasGradient {
  void* data = nullptr;  // nullptr: not wanted
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

struct BackwardParams : Problem {
  Matrix output, grad_output;
  RowValues lse, grad_lse;  // grad_lse.data is nullptr where nothing depends on lse
  RowValues delta;          // working memory of the CPU kernels, shaped as lse
  Output grad_query, grad_key, grad_value;
  // Of the CPU kernels: float32 zeros, contiguous; grad_query itself for float32 and float64.
  Output query_sums;
  int64_t query_elements = 0;  // of grad_query
  BiasGradient grad_bias;
  void* grad_sinks = nullptr;  // (heads,), float32 or float64
  float* workspace = nullptr;  // of the GPU kernels: gpu::attention_backward_workspace
  int32_t* turns = nullptr;    // zeros on entry
};

// Keys and values appended to a cache in place, new row t of batch b at cache_lengths[b] + t.
struct AppendParams {
  int64_t batch = 0, kv_heads = 0, rows = 0;
  int64_t key_bytes = 0, value_bytes = 0;  // of one row
  int64_t element_bytes = 0;               // the unit of the strides
  Matrix new_key, new_value;
  Output key_cache, value_cache;
  const int32_t* cache_lengths = nullptr;
  const int32_t* page_table = nullptr;
  int64_t page_table_row = 0, page_size = 0, pages = 0;
  int64_t capacity = 0;  // tokens that a sequence has room for
};

}  // namespace flashkern::attention

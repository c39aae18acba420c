#include "torch/attention.h"

#include <algorithm>
#include <limits>

#include "attention/cpu/forward.h"
#include "attention/gpu.h"
#include "torch/device.h"
#include "torch/threads.h"

namespace flashkern {
namespace {

using attention::Bias;
using attention::BiasKind;
using attention::Problem;

// The stride of a dimension of a broadcast tensor: 0 where its size is 1.
int64_t broadcast_stride(const Tensor& t, int64_t dim) {
  return t.size(dim) == 1 ? 0 : t.stride(dim);
}

Bias bias_of(const OptionalTensor& t, const Tensor& query) {
  Bias bias;
  if (!t.has_value()) return bias;
  STD_TORCH_CHECK(t->dim() == 4, "attention: bias must be 4-D");
  bias.data = t->const_data_ptr();
  if (t->scalar_type() == ScalarType::Bool) {
    bias.kind = BiasKind::kBool;
  } else if (t->scalar_type() == query.scalar_type()) {
    bias.kind = BiasKind::kQueryDtype;
  } else {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float,
                    "attention: bias must be bool, float32 or of query's dtype");
    bias.kind = BiasKind::kFloat32;
  }
  bias.batch = broadcast_stride(*t, 0);
  bias.head = broadcast_stride(*t, 1);
  bias.row = broadcast_stride(*t, 2);
  bias.column = broadcast_stride(*t, 3);
  return bias;
}

void set_sinks(Problem& p, const OptionalTensor& sinks) {
  if (!sinks.has_value()) return;
  const bool wide = p.dtype == DType::kFloat64;
  STD_TORCH_CHECK(sinks->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
                      sinks->is_contiguous(),
                  "attention: sinks must be contiguous and of the dtype of lse");
  if (wide) {
    p.sinks_double = static_cast<const double*>(sinks->const_data_ptr());
  } else {
    p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
}

void set_alibi(Problem& p, const OptionalTensor& slopes) {
  if (!slopes.has_value()) return;
  STD_TORCH_CHECK(slopes->scalar_type() == ScalarType::Float,
                  "attention: alibi_slopes must be float32");
  p.alibi_slopes = static_cast<const float*>(slopes->const_data_ptr());
  p.alibi_head = slopes->stride(slopes->dim() - 1);
  p.alibi_batch = slopes->dim() == 2 ? broadcast_stride(*slopes, 0) : 0;
}

// A bias is read up to `longest` rows or columns. On a GPU nobody looks: that would wait for the
// stream, and no graph could capture the call.
void check_cu_seqlens(const char* name, const Tensor& t, int64_t batch, int64_t rows,
                      int64_t longest) {
  if (!host_readable(t)) return;
  const auto* cu = static_cast<const int32_t*>(t.const_data_ptr());
  bool good = t.size(0) == batch + 1 && cu[0] >= 0 && cu[batch] <= rows;
  for (int64_t b = 0; good && b < batch; ++b) {
    good = cu[b] <= cu[b + 1];
    STD_TORCH_CHECK(int64_t{cu[b + 1]} - cu[b] <= longest, "attention: ", name,
                    " must hold sequences of max_seqlen = ", longest, " at most, got ",
                    int64_t{cu[b + 1]} - cu[b]);
  }
  STD_TORCH_CHECK(good, "attention: ", name, " must rise from 0 to the ", rows, " rows at most");
}

// The pages of the tokens that there are, and of those appended.
void check_pages(const int32_t* table, int64_t row, int64_t batch, int64_t columns,
                 const int32_t* lengths, int64_t page_size, int64_t pages, int64_t appended = 0) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t used = (lengths[b] + appended + page_size - 1) / page_size;
    STD_TORCH_CHECK(lengths[b] >= 0 && used <= columns,
                    "attention: kv_lengths must fit the pages of page_table");
    for (int64_t i = 0; i < used; ++i) {
      const int32_t page = table[b * row + i];
      STD_TORCH_CHECK(page >= 0 && page < pages, "attention: page_table must hold pages from 0 to ",
                      pages - 1, ", got ", page);
    }
  }
}

// attention_kvcache's lengths; attention's kv_lengths may pass the last key.
void check_cache_lengths(const Problem& p, const Tensor& lengths) {
  if (p.alignment != attention::Alignment::kOwnLength || !host_readable(lengths)) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    STD_TORCH_CHECK(p.kv_lengths[b] >= 0 && p.kv_lengths[b] <= p.seq_k,
                    "attention: cache_lengths must lie in [0, ", p.seq_k, "], got ",
                    p.kv_lengths[b]);
  }
}

void set_packed(Problem& p, const AttentionArguments& a) {
  STD_TORCH_CHECK(a.cu_seqlens_k.has_value(), "attention: cu_seqlens_k must be given too");
  p.batch = a.cu_seqlens_q->size(0) - 1;
  check_cu_seqlens("cu_seqlens_q", *a.cu_seqlens_q, p.batch, a.query.size(0), a.max_seqlen_q);
  check_cu_seqlens("cu_seqlens_k", *a.cu_seqlens_k, p.batch, a.key.size(0), a.max_seqlen_k);
  p.seq_q = a.max_seqlen_q;
  p.seq_k = a.max_seqlen_k;
  p.packed_q = a.query.size(0);
  p.packed_k = a.key.size(0);
}

void set_paged(Problem& p, const AttentionArguments& a) {
  STD_TORCH_CHECK(a.kv_lengths.has_value(), "attention: page_table must come with kv_lengths");
  p.page_table = int32_data("page_table", a.page_table);
  p.page_table_row = a.page_table->stride(0);
  p.page_size = a.key.size(2);
  p.pages = a.key.size(0);
  STD_TORCH_CHECK(p.page_size > 0, "attention: pages must hold at least one token");
  p.seq_k = p.pages > 0 ? a.page_table->size(1) * p.page_size : 0;
  if (!host_readable(a.key)) return;
  check_pages(p.page_table, p.page_table_row, p.batch, a.page_table->size(1), p.kv_lengths,
              p.page_size, p.pages);
}

// Laid out as query is: where its heads lie side by side in a row, so do those of the output.
Tensor new_output(const Tensor& query, int64_t rows, int64_t dim) {
  const ScalarType dtype = query.scalar_type();
  const int64_t heads = query.size(1);
  if (query.dim() == 3) return empty<3>(query, {rows, heads, dim}, dtype);
  const int64_t batch = query.size(0);
  if (query.stride(1) >= query.stride(2)) return empty<4>(query, {batch, heads, rows, dim}, dtype);
  const int64_t row = heads * dim;
  return empty_strided<4>(query, {batch, heads, rows, dim}, {rows * row, dim, row, 1}, dtype);
}

void launch_on_gpu(attention::ForwardParams& p, const Tensor& query) {
  STD_TORCH_CHECK(p.dtype != DType::kFloat64,
                  "attention: query must have dtype float32, bfloat16 or float16 on a GPU");
  constexpr int64_t kMost = 1 << 30;  // the kernels count keys, and rows of a group, in 32 bits
  const int64_t keys = std::max(p.seq_k, p.shared_keys), rows = p.group() * p.beams * p.seq_q;
  STD_TORCH_CHECK(keys < kMost && rows < kMost, "attention: keys (", keys,
                  ") and a group's query rows (", rows, ") must be fewer than 2^30 on a GPU");
  if constexpr (kGpuKernels) {
    const GpuScope scope(query);
    const int64_t floats = gpu::attention_workspace(p) / static_cast<int64_t>(sizeof(float));
    Tensor workspace = torch::stable::new_empty(query, {floats}, ScalarType::Float);
    p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    gpu::attention_forward(p, scope.stream());
  }
}

void launch(attention::ForwardParams& p, const Tensor& query) {
  const bool wide = p.dtype == DType::kFloat64;
  if (on_gpu(query)) {
    launch_on_gpu(p, query);
  } else if constexpr (kCpuKernels) {
    wide ? attention_forward_float64(p, torch_threads()) : attention_forward(p, torch_threads());
  }
}

void check_append(const attention::AppendParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t length = p.cache_lengths[b];
    STD_TORCH_CHECK(length >= 0 && length + p.rows <= p.capacity,
                    "attention: cache_lengths must leave room for ", p.rows, " of ", p.capacity,
                    " tokens, got ", length);
  }
  if (p.page_table == nullptr || p.rows == 0) return;
  check_pages(p.page_table, p.page_table_row, p.batch, p.capacity / p.page_size, p.cache_lengths,
              p.page_size, p.pages, p.rows);
}

// Rows of a packed tensor that no sequence holds attend to nothing. On a GPU they may be any.
void clear_uncovered(const Problem& p, int64_t rows, Tensor& output, Tensor& lse) {
  if (host_readable(output) && p.cu_seqlens_q[0] == 0 && p.cu_seqlens_q[p.batch] == rows) return;
  torch::stable::zero_(output);
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
}

attention::Output writable(const attention::Matrix& m) {
  return {const_cast<void*>(m.data), m.batch, m.head, m.row};
}

}  // namespace

// What Python has checked is not checked again; this is what would otherwise read foreign memory.
void check_matrix(const char* name, const Tensor& t, const Tensor& query) {
  STD_TORCH_CHECK(t.is_cpu() == query.is_cpu() && t.is_cuda() == query.is_cuda(),
                  "attention: ", name, " must be on query's device");
  STD_TORCH_CHECK(t.scalar_type() == query.scalar_type(), "attention: ", name,
                  " must have the dtype of query");
  STD_TORCH_CHECK(t.dim() == 3 || t.dim() == 4, "attention: ", name, " must be 3-D or 4-D");
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.stride(last) == 1 || t.size(last) <= 1, "attention: ", name,
                  " must have a contiguous last dimension");
}

const int32_t* int32_data(const char* name, const OptionalTensor& t) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int, "attention: ", name, " must be int32");
  STD_TORCH_CHECK(t->size(t->dim() - 1) <= 1 || t->stride(t->dim() - 1) == 1, "attention: ", name,
                  " must have a contiguous last dimension");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

attention::Matrix matrix_of(const Tensor& t) {
  if (t.dim() == 3) return {t.const_data_ptr(), 0, t.stride(1), t.stride(0)};
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

attention::Output output_of(const Tensor& t) {
  attention::Output out = writable(matrix_of(t));
  out.data = t.mutable_data_ptr();
  return out;
}

attention::RowValues row_values_of(const Tensor& t) {
  if (t.dim() == 2) return {t.mutable_data_ptr(), 0, t.stride(0)};
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1)};
}

void fill_problem(Problem& p, const AttentionArguments& a) {
  check_matrix("query", a.query, a.query);
  check_matrix("key", a.key, a.query);
  check_matrix("value", a.value, a.query);
  const bool packed = a.cu_seqlens_q.has_value();
  p.dtype = dtype_of(a.query);
  p.heads = a.query.size(1);
  p.kv_heads = a.key.size(1);
  p.head_dim = a.query.size(a.query.dim() - 1);
  p.value_dim = a.value.size(a.value.dim() - 1);
  p.query = matrix_of(a.query);
  p.key = matrix_of(a.key);
  p.value = matrix_of(a.value);
  p.cu_seqlens_q = int32_data("cu_seqlens_q", a.cu_seqlens_q);
  p.cu_seqlens_k = int32_data("cu_seqlens_k", a.cu_seqlens_k);
  p.kv_lengths = int32_data("kv_lengths", a.kv_lengths);
  if (packed) {
    set_packed(p, a);
  } else {
    p.batch = a.query.size(0);
    p.seq_q = a.query.size(2);
    p.seq_k = a.key.size(2);
    if (a.page_table.has_value()) set_paged(p, a);
  }
  p.alignment = static_cast<attention::Alignment>(a.alignment);
  if (p.kv_lengths != nullptr) check_cache_lengths(p, *a.kv_lengths);
  p.window_left = a.window_left;
  p.window_right = a.window_right;
  p.scale = a.scale;
  p.softcap = a.softcap;
  p.dropout_p = a.dropout_p;
  p.bias = bias_of(a.bias, a.query);
  set_sinks(p, a.sinks);
  set_alibi(p, a.alibi_slopes);
  STD_TORCH_CHECK(p.dropout_p == 0 || a.seed.has_value(), "attention: dropout needs a seed");
  if (a.seed.has_value()) p.seed = seed_of(*a.seed, a.query);
}

std::tuple<Tensor, Tensor> run_forward(attention::ForwardParams& p, const Tensor& query) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t rows = query.size(packed ? 0 : 2);
  const bool wide = p.dtype == DType::kFloat64;
  const auto lse_type = wide ? ScalarType::Double : ScalarType::Float;
  Tensor output = new_output(query, rows, p.value_dim);
  Tensor lse = packed ? empty<2>(query, {p.heads, rows}, lse_type)
                      : empty<3>(query, {p.batch, p.heads, rows}, lse_type);
  p.output = output_of(output);
  p.lse = row_values_of(lse);
  if (packed) clear_uncovered(p, rows, output, lse);
  if (p.batch * p.heads * rows > 0) launch(p, query);
  return {output, lse};
}

std::tuple<Tensor, Tensor> attention_forward(
    Tensor query, Tensor key, Tensor value, OptionalTensor bias, OptionalTensor alibi_slopes,
    OptionalTensor sinks, OptionalTensor kv_lengths, OptionalTensor cu_seqlens_q,
    OptionalTensor cu_seqlens_k, OptionalTensor page_table, OptionalTensor seed,
    int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t alignment, int64_t window_left,
    int64_t window_right, double scale, double softcap, double dropout_p) {
  attention::ForwardParams p;
  fill_problem(p, {query, key, value, bias, alibi_slopes, sinks, kv_lengths, cu_seqlens_q,
                   cu_seqlens_k, page_table, seed, max_seqlen_q, max_seqlen_k, alignment,
                   window_left, window_right, scale, softcap, dropout_p});
  return run_forward(p, query);
}

void attention_append_kv(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor cache_lengths,
                         OptionalTensor page_table, OptionalTensor beam_table,
                         OptionalTensor shared_k, OptionalTensor shared_lengths) {
  check_matrix("k_cache", k_cache, k);
  check_matrix("v_cache", v_cache, k);
  check_matrix("k", k, k);
  check_matrix("v", v, k);
  attention::AppendParams p;
  p.batch = k.size(0);
  p.kv_heads = k.size(1);
  p.rows = k.size(2);
  p.element_bytes = static_cast<int64_t>(k.element_size());
  p.key_bytes = k.size(3) * p.element_bytes;
  p.value_bytes = v.size(3) * p.element_bytes;
  p.new_key = matrix_of(k);
  p.new_value = matrix_of(v);
  p.key_cache = output_of(k_cache);
  p.value_cache = output_of(v_cache);
  p.cache_lengths = int32_data("cache_lengths", cache_lengths);
  p.page_size = k_cache.size(2);
  p.pages = k_cache.size(0);
  int64_t capacity = k_cache.size(2);
  if (page_table.has_value()) {
    p.page_table = int32_data("page_table", page_table);
    p.page_table_row = page_table->stride(0);
    capacity *= page_table->size(1);
  }
  p.capacity = capacity;
  if (host_readable(k)) {
    check_append(p);
    check_beams(cache_lengths, p.rows, beam_table, shared_k, shared_lengths);
  }
  if (p.rows == 0) return;
  if (on_gpu(k)) {
    if constexpr (kGpuKernels) gpu::attention_append(p, GpuScope(k).stream());
  } else if constexpr (kCpuKernels) {
    attention_append(p, torch_threads());
  }
}

}  // namespace flashkern

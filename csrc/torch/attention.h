// Attention: stable-ABI adapters of the forward pass and of the cache append. The schemas are in
// csrc/ops.cpp, the meaning of each argument in flashkern/attention.py.
#pragma once

#include <tuple>

#include "attention/params.h"
#include "torch/tensor.h"

namespace flashkern {

using OptionalTensor = std::optional<Tensor>;

// The arguments that the forward and the backward pass share.
struct AttentionArguments {
  const Tensor &query, &key, &value;
  const OptionalTensor &bias, &alibi_slopes, &sinks, &kv_lengths, &cu_seqlens_q, &cu_seqlens_k,
      &page_table, &seed;
  int64_t max_seqlen_q, max_seqlen_k, alignment, window_left, window_right;
  double scale, softcap, dropout_p;
};

void fill_problem(attention::Problem& p, const AttentionArguments& a);

// The output and lse of a problem that is filled but for them.
std::tuple<Tensor, Tensor> run_forward(attention::ForwardParams& p, const Tensor& query);

void check_matrix(const char* name, const Tensor& t, const Tensor& query);
const int32_t* int32_data(const char* name, const OptionalTensor& t);

// A dense (batch, heads, rows, dim) tensor, or a packed (rows, heads, dim) one.
attention::Matrix matrix_of(const Tensor& t);
attention::Output output_of(const Tensor& t);
attention::RowValues row_values_of(const Tensor& t);  // (batch, heads, rows) or (heads, rows)

std::tuple<Tensor, Tensor> attention_forward(
    Tensor query, Tensor key, Tensor value, OptionalTensor bias, OptionalTensor alibi_slopes,
    OptionalTensor sinks, OptionalTensor kv_lengths, OptionalTensor cu_seqlens_q,
    OptionalTensor cu_seqlens_k, OptionalTensor page_table, OptionalTensor seed,
    int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t alignment, int64_t window_left,
    int64_t window_right, double scale, double softcap, double dropout_p);

// Over the caches of beams: cache rows by the table, a prompt's keys once for all its beams.
std::tuple<Tensor, Tensor> attention_beams(
    Tensor query, Tensor key, Tensor value, OptionalTensor bias, OptionalTensor alibi_slopes,
    OptionalTensor sinks, Tensor kv_lengths, OptionalTensor page_table, OptionalTensor seed,
    OptionalTensor beam_table, OptionalTensor shared_k, OptionalTensor shared_v,
    OptionalTensor shared_lengths, int64_t alignment, int64_t window_left, int64_t window_right,
    double scale, double softcap, double dropout_p);

// Beams whose lengths, and `appended` tokens more, leave the table or their prompt's keys; on a
// CPU.
void check_beams(const Tensor& lengths, int64_t appended, const OptionalTensor& beam_table,
                 const OptionalTensor& shared_k, const OptionalTensor& shared_lengths);

// What would fail in the attention that follows must fail before the cache is written: hence the
// beams' arguments.
void attention_append_kv(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor cache_lengths,
                         OptionalTensor page_table, OptionalTensor beam_table,
                         OptionalTensor shared_k, OptionalTensor shared_lengths);

}  // namespace flashkern

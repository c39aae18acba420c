// attention_kvcache over the caches of beam search: the stable-ABI adapter.
#include "torch/attention.h"
#include "torch/device.h"

namespace flashkern {
namespace {

using attention::ForwardParams;

// The beam table of attention_kvcache, (prompts, beams, tokens).
void set_beam_table(ForwardParams& p, const Tensor& table) {
  STD_TORCH_CHECK(table.dim() == 3 && table.is_contiguous(),
                  "attention: beam_table must be contiguous, (prompts, beams, tokens)");
  p.beams = table.size(1);
  p.beam_table = int32_data("beam_table", table);
  p.beam_table_row = table.size(2);
  STD_TORCH_CHECK(p.kv_lengths != nullptr && table.size(0) * p.beams == p.batch,
                  "attention: beam_table must come with kv_lengths, and a row for each beam");
}

// A beam reads the rows, and the pages, of the others up to its own length. `appended`: tokens that
// each will have beside those of kv_lengths.
void check_values(const ForwardParams& p, int64_t appended) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t prompt = b / p.beams;
    const int64_t length = p.shared_lengths == nullptr ? 0 : p.shared_lengths[prompt];
    STD_TORCH_CHECK(length >= 0 && length <= p.shared_keys,
                    "attention: shared_lengths must lie in [0, ", p.shared_keys, "], got ", length);
    STD_TORCH_CHECK(p.kv_lengths[b] == p.kv_lengths[prompt * p.beams],
                    "attention: cache_lengths must be equal for all beams of a prompt");
    if (p.beam_table == nullptr) continue;
    const int64_t tokens = p.kv_lengths[b] + appended;
    STD_TORCH_CHECK(tokens <= p.beam_table_row,
                    "attention: beam_table must have a column for each token");
    const int32_t* row = p.beam_table + b * p.beam_table_row;
    bool good = true;
    for (int64_t t = 0; t < tokens; ++t) good &= row[t] >= 0 && row[t] < p.beams;
    STD_TORCH_CHECK(good, "attention: beam_table must hold beams from 0 to ", p.beams - 1);
  }
}

// The keys that the beams of a prompt share, (prompts, kv_heads, tokens, dim).
void set_shared(ForwardParams& p, const Tensor& key, const Tensor& value,
                const OptionalTensor& lengths, const Tensor& query) {
  check_matrix("shared_k", key, query);
  check_matrix("shared_v", value, query);
  const int64_t prompts = key.size(0);
  STD_TORCH_CHECK(key.dim() == 4 && value.dim() == 4 && prompts > 0 && p.batch % prompts == 0 &&
                      (p.beam_table == nullptr || p.beams == p.batch / prompts),
                  "attention: shared_k must have a row for each prompt");
  STD_TORCH_CHECK(key.size(1) == p.kv_heads && value.size(1) == p.kv_heads &&
                      key.size(3) == p.head_dim && value.size(3) == p.value_dim &&
                      key.size(2) == value.size(2) && value.size(0) == prompts,
                  "attention: shared_k and shared_v must have the heads and dims of the cache");
  STD_TORCH_CHECK(p.kv_lengths != nullptr && p.dropout_p == 0 && p.cu_seqlens_q == nullptr,
                  "attention: shared_k takes cache lengths, no dropout and no cu_seqlens");
  p.beams = p.batch / prompts;
  p.shared = {matrix_of(key), matrix_of(value)};
  p.shared_keys = key.size(2);
  p.shared_lengths = int32_data("shared_lengths", lengths);
}

}  // namespace

void check_beams(const Tensor& lengths, int64_t appended, const OptionalTensor& beam_table,
                 const OptionalTensor& shared_k, const OptionalTensor& shared_lengths) {
  if (!beam_table.has_value() && !shared_k.has_value()) return;
  ForwardParams p;
  p.batch = lengths.size(0);
  p.kv_lengths = int32_data("cache_lengths", lengths);
  if (beam_table.has_value()) set_beam_table(p, *beam_table);
  if (shared_k.has_value()) {
    const int64_t prompts = shared_k->size(0);
    STD_TORCH_CHECK(prompts > 0 && p.batch % prompts == 0,
                    "attention: shared_k must have a row for each prompt");
    p.beams = p.batch / prompts;
    p.shared_keys = shared_k->size(2);
    p.shared_lengths = int32_data("shared_lengths", shared_lengths);
  }
  check_values(p, appended);
}

std::tuple<Tensor, Tensor> attention_beams(
    Tensor query, Tensor key, Tensor value, OptionalTensor bias, OptionalTensor alibi_slopes,
    OptionalTensor sinks, Tensor kv_lengths, OptionalTensor page_table, OptionalTensor seed,
    OptionalTensor beam_table, OptionalTensor shared_k, OptionalTensor shared_v,
    OptionalTensor shared_lengths, int64_t alignment, int64_t window_left, int64_t window_right,
    double scale, double softcap, double dropout_p) {
  ForwardParams p;
  const OptionalTensor lengths = kv_lengths, none;
  fill_problem(p, {query, key, value, bias, alibi_slopes, sinks, lengths, none, none, page_table,
                   seed, 0, 0, alignment, window_left, window_right, scale, softcap, dropout_p});
  if (beam_table.has_value()) set_beam_table(p, *beam_table);
  if (shared_k.has_value()) set_shared(p, *shared_k, *shared_v, shared_lengths, query);
  if (host_readable(query)) check_values(p, 0);
  return run_forward(p, query);
}

}  // namespace flashkern

// Every operator's schema, in one table. Read this first: what flashkern gives torch is listed
// here, the functions that run are declared in csrc/torch/<operator>.h. Autograd, fake kernels,
// autocast and vmap rules are Python (flashkern/<operator>.py).
#include <torch/csrc/stable/library.h>

#include <string>

#include "simd/isa.h"
#include "torch/attention.h"
#include "torch/attention_backward.h"
#include "torch/beam.h"
#include "torch/lora.h"

namespace flashkern {

// Returns the active CPU ISA; a non-empty `name` forces that one first, "best" goes back to the
// best.
std::string cpu_isa(std::string name) {
  if (!name.empty()) {
    const bool known = set_isa(name == "best" ? "" : name.c_str());
    STD_TORCH_CHECK(known, "cpu_isa: name must be an ISA that this CPU and build have, got ", name);
  }
  return isa_name(active_isa());
}

}  // namespace flashkern

STABLE_TORCH_LIBRARY(flashkern, m) {
  m.def("cpu_isa(str name=\"\") -> str");

  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? kv_lengths, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? page_table, Tensor? seed, SymInt max_seqlen_q, "
      "SymInt max_seqlen_k, int alignment, int window_left, int window_right, float scale, "
      "float softcap, float dropout_p) -> (Tensor output, Tensor lse)");
  m.def(
      "attention_beams(Tensor query, Tensor key, Tensor value, Tensor? bias, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor kv_lengths, Tensor? page_table, Tensor? seed, "
      "Tensor? beam_table, Tensor? shared_k, Tensor? shared_v, Tensor? shared_lengths, "
      "int alignment, int window_left, int window_right, float scale, float softcap, "
      "float dropout_p) -> (Tensor output, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor output, Tensor lse, Tensor? bias, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor? kv_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor? seed, SymInt max_seqlen_q, SymInt max_seqlen_k, int alignment, int window_left, "
      "int window_right, float scale, float softcap, float dropout_p, bool bias_needs_grad) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, "
      "Tensor grad_sinks)");
  m.def(
      "attention_append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
      "Tensor cache_lengths, Tensor? page_table, Tensor? beam_table=None, Tensor? shared_k=None, "
      "Tensor? shared_lengths=None) -> ()");

  m.def(
      "beam_topk(Tensor logits, Tensor beam_scores, SymInt k, Tensor? logsumexp=None, "
      "Tensor? excluded=None, Tensor? nodes=None, Tensor? trie_starts=None, "
      "Tensor? trie_tokens=None) -> (Tensor scores, Tensor tokens, Tensor parents, Tensor "
      "logsumexp_out)");

  m.def("lora_base(str name=\"\") -> str");
  // y and h: what the backward pass keeps. With ids, one adapter for each row (-1: none).
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? "
      "ids, Tensor? scalings, float scaling, float dropout_p, Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "lora_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor h, Tensor? ids, Tensor? scalings, float scaling, float dropout_p, Tensor? seed, "
      "bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flashkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&flashkern::cpu_isa));
  m.impl("lora_base", TORCH_BOX(&flashkern::set_lora_base));
}

#if !defined(FK_EMULATED_KERNELS)
STABLE_TORCH_LIBRARY_IMPL(flashkern, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&flashkern::attention_forward));
  m.impl("attention_beams", TORCH_BOX(&flashkern::attention_beams));
  m.impl("attention_backward", TORCH_BOX(&flashkern::attention_backward));
  m.impl("attention_append_kv", TORCH_BOX(&flashkern::attention_append_kv));
  m.impl("beam_topk", TORCH_BOX(&flashkern::beam_topk));
  m.impl("lora_linear", TORCH_BOX(&flashkern::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&flashkern::lora_linear_backward));
}
#endif

// An operator without GPU kernels is not listed: torch raises NotImplementedError. The emulated
// library (tests only) runs the GPU kernels' sources on CPU tensors.
#if defined(FK_EMULATED_KERNELS)
STABLE_TORCH_LIBRARY_IMPL(flashkern, CPU, m) {
#elif defined(FK_CUDA_KERNELS)
STABLE_TORCH_LIBRARY_IMPL(flashkern, CUDA, m) {
#endif
#if defined(FK_EMULATED_KERNELS) || defined(FK_CUDA_KERNELS)
  m.impl("attention_backward", TORCH_BOX(&flashkern::attention_backward));
  m.impl("attention_append_kv", TORCH_BOX(&flashkern::attention_append_kv));
  m.impl("attention_forward", TORCH_BOX(&flashkern::attention_forward));
  m.impl("attention_beams", TORCH_BOX(&flashkern::attention_beams));
  m.impl("beam_topk", TORCH_BOX(&flashkern::beam_topk));
  m.impl("lora_linear", TORCH_BOX(&flashkern::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&flashkern::lora_linear_backward));
}
#endif

// Which kernel an attention call would get and what it costs, for flashkern.explain.
#include "attention/plan.h"
#include "attention/sm80/plan.h"
#include "host/bindings.h"

namespace py = pybind11;

namespace {

using namespace flashkern::attention;

py::dict attention_plan(int64_t batch, int64_t heads, int64_t kv_heads, int64_t seq_q,
                        int64_t seq_k, int64_t head_dim, int64_t value_dim, int64_t element_bytes,
                        int alignment, int64_t window_left, int64_t window_right, bool tiles) {
  Problem p;
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.seq_q = seq_q;
  p.seq_k = seq_k;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  p.dtype = element_bytes == 2 ? flashkern::DType::kBFloat16 : flashkern::DType::kFloat32;
  p.alignment = static_cast<Alignment>(alignment);
  p.window_left = window_left;
  p.window_right = window_right;
  const SequencePlan plan = plan_sequence(p, sequence_of(p, 0), tiles);
  py::dict out;
  out["kernel"] = plan.decode ? "decode" : "matrix";
  out["rows"] = plan.rows;
  out["task_rows"] = plan.task_rows;
  out["key_block"] = kKeyBlock;
  out["split_keys"] = plan.split_keys;
  out["splits"] = plan.splits;
  out["tasks"] = batch * kv_heads * plan.tasks_per_head();
  out["decode_rows"] = decode_rows(p.dtype, tiles);
  out["flops"] = forward_flops(p);
  out["backward_flops"] = backward_flops(p);
  out["bytes"] = forward_bytes(p, element_bytes);
  return out;
}

py::dict attention_gpu_plan(int64_t batch, int64_t heads, int64_t kv_heads, int64_t seq_q,
                            int64_t seq_k, int64_t head_dim, int64_t value_dim, bool float32,
                            int64_t packed_q, int64_t packed_k, bool plain, int64_t beams,
                            int64_t shared_keys) {
  const int32_t starts[1] = {};  // never read: the plan knows no lengths
  ForwardParams p;
  p.dtype = float32 ? flashkern::DType::kFloat32 : flashkern::DType::kBFloat16;
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.seq_q = seq_q;
  p.seq_k = seq_k;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  if (packed_q > 0) p.cu_seqlens_q = starts;
  p.packed_q = packed_q;
  p.packed_k = packed_k;
  if (!plain) p.softcap = 1;  // or any other option that scores can have
  p.beams = beams;
  p.shared_keys = shared_keys;
  if (shared_keys > 0) p.shared.key.data = starts;  // nor any key
  const sm80::ForwardPlan plan = sm80::plan_forward(p);
  py::dict out;
  const char* const forms[] = {"few", "narrow", "wide", "plain"};
  out["form"] = forms[static_cast<int>(plan.form)];
  out["dim"] = plan.dim;
  out["warps"] = plan.warps;
  out["tile_rows"] = plan.tile_rows;
  out["tile_keys"] = plan.tile_keys;
  out["shared_bytes"] = plan.shared_bytes;
  out["blocks"] = plan.blocks;
  out["split_keys"] =
      plan.split_keys.of(static_cast<int>(p.group() * seq_q), static_cast<int>(seq_k));
  out["splits"] = plan.splits;
  out["workspace_bytes"] = plan.workspace_floats * static_cast<int64_t>(sizeof(float));
  if (plan.joined) {
    const sm80::ForwardPlan shared = sm80::plan_shared(shared_part(p), plan);
    out["shared_splits"] = shared.splits;
    out["shared_blocks"] = shared.blocks;
  }
  return out;
}

}  // namespace

FK_HOST_BINDINGS(attention)(py::module_& m) {
  m.def("attention_plan", &attention_plan, py::arg("batch"), py::arg("heads"), py::arg("kv_heads"),
        py::arg("seq_q"), py::arg("seq_k"), py::arg("head_dim"), py::arg("value_dim"),
        py::arg("element_bytes"), py::arg("alignment") = 1, py::arg("window_left") = -1,
        py::arg("window_right") = -1, py::arg("tiles") = false,
        "The kernel, the cut and the cost of an attention call on sequences of one length: a dict. "
        "`rows` are the query rows of a KV head, `decode_rows` how many the decode kernel takes.");
  m.def("attention_gpu_plan", &attention_gpu_plan, py::arg("batch"), py::arg("heads"),
        py::arg("kv_heads"), py::arg("seq_q"), py::arg("seq_k"), py::arg("head_dim"),
        py::arg("value_dim"), py::arg("float32") = false, py::arg("packed_q") = 0,
        py::arg("packed_k") = 0, py::arg("plain") = true, py::arg("beams") = 1,
        py::arg("shared_keys") = 0,
        "How the sm_80 forward kernel cuts an attention call: a dict. `packed_q`, `packed_k`: rows "
        "of the packed tensors of a ragged batch. `plain`: no option but a band. `splits` are the "
        "most parts that the keys of a sequence are cut into. `beams` rows of the batch share the "
        "`shared_keys` of a prompt, which have a launch of their own.");
}

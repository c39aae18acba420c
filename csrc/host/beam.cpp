// How a beam top-k call would be cut and what it costs, for flashkern.explain.
#include "beam/plan.h"
#include "host/bindings.h"
#include "simd/isa.h"

namespace py = pybind11;

FK_HOST_BINDINGS(beam)(py::module_& m) {
  m.def(
      "beam_topk_plan",
      [](int64_t batch, int64_t beams, int64_t vocab, int64_t k, bool half, int threads) {
        flashkern::beam::TopkParams p;
        p.dtype = half ? flashkern::DType::kBFloat16 : flashkern::DType::kFloat32;
        p.batch = batch;
        p.beams = beams;
        p.vocab = vocab;
        p.k = k;
        const auto plan = flashkern::beam::plan_topk(p, threads);
        py::dict out;
        out["chunk"] = flashkern::beam::kChunk;
        out["scan_tasks"] = batch * beams * plan.slices;
        out["gather_tasks"] = batch * plan.segments;
        out["threads"] = plan.workers;
        out["workspace_bytes"] = plan.workspace_bytes;
        out["read_bytes"] = plan.read_bytes;
        out["write_bytes"] = plan.write_bytes;
        out["flops"] = plan.flops;
        return out;
      },
      py::arg("batch"), py::arg("beams"), py::arg("vocab"), py::arg("k"), py::arg("half"),
      py::arg("threads"), "The cut and the cost of a beam_topk call: a dict.");
}

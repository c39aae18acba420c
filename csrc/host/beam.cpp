// How a beam top-k call would be cut and what it costs, for flashkern.explain and for tests.
#include "beam/plan.h"
#include "beam/sm80/plan.h"
#include "host/bindings.h"
#include "simd/isa.h"

namespace py = pybind11;

namespace {

flashkern::beam::TopkParams problem(int64_t batch, int64_t beams, int64_t vocab, int64_t k,
                                    bool half) {
  flashkern::beam::TopkParams p;
  p.dtype = half ? flashkern::DType::kBFloat16 : flashkern::DType::kFloat32;
  p.batch = batch;
  p.beams = beams;
  p.vocab = vocab;
  p.k = k;
  return p;
}

template <class Plan>
py::dict cost(const Plan& plan) {
  py::dict out;
  out["chunk"] = flashkern::beam::kChunk;
  out["workspace_bytes"] = plan.workspace_bytes;
  out["read_bytes"] = plan.read_bytes;
  out["write_bytes"] = plan.write_bytes;
  out["flops"] = plan.flops;
  return out;
}

}  // namespace

FK_HOST_BINDINGS(beam)(py::module_& m) {
  m.def(
      "beam_topk_plan",
      [](int64_t batch, int64_t beams, int64_t vocab, int64_t k, bool half, int threads) {
        const auto plan =
            flashkern::beam::plan_topk(problem(batch, beams, vocab, k, half), threads);
        py::dict out = cost(plan);
        out["scan_tasks"] = batch * beams * plan.slices;
        out["gather_tasks"] = batch * plan.segments;
        out["threads"] = plan.workers;
        return out;
      },
      py::arg("batch"), py::arg("beams"), py::arg("vocab"), py::arg("k"), py::arg("half"),
      py::arg("threads"), "The cut and the cost of a beam_topk call on a CPU: a dict.");
  m.def(
      "beam_topk_gpu_plan",
      [](int64_t batch, int64_t beams, int64_t vocab, int64_t k, bool half, int processors) {
        const auto plan =
            flashkern::beam::sm80::plan_launch(problem(batch, beams, vocab, k, half), processors);
        py::dict out = cost(plan);
        out["blocks"] = plan.blocks;
        out["splits"] = plan.splits;
        out["split_spans"] = plan.split_spans;
        out["row_spans"] = plan.row_spans;
        out["chosen_limit"] = plan.chosen_limit;
        out["capacity"] = plan.capacity;
        out["lists_spans"] = plan.lists_spans;
        out["ticket_bytes"] = plan.layout.ticket_bytes;
        out["in_shared_memory"] = plan.shared_chosen && plan.shared_candidates;
        return out;
      },
      py::arg("batch"), py::arg("beams"), py::arg("vocab"), py::arg("k"), py::arg("half"),
      py::arg("processors"), "The same on a GPU with so many multiprocessors.");
}

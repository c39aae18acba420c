// How a LoRA call is cut, for flashkern.explain and for tests.
#include "lora/plan.h"

#include "host/bindings.h"
#include "lora/sm80/plan.h"

namespace py = pybind11;

namespace {

using namespace flashkern;

constexpr const char* kBases[] = {"blas", "tiles", "few"};

DType dtype_named(const std::string& name) {
  return name == "float32"    ? DType::kFloat32
         : name == "bfloat16" ? DType::kBFloat16
         : name == "float16"  ? DType::kFloat16
                              : DType::kFloat64;
}

py::dict cpu_plan(int64_t rows, int64_t columns, const std::string& dtype, int choice,
                  int threads) {
  const LoraBase base =
      lora_base(rows, dtype_named(dtype), true, static_cast<LoraChoice>(choice), cpu_facts());
  py::dict out;
  out["base"] = kBases[static_cast<int>(base)];
  if (base == LoraBase::kFew) {
    out["tasks"] = (columns + kFewTaskCols - 1) / kFewTaskCols;
  } else if (base == LoraBase::kTiles) {
    const ProductCut cut = product_cut(rows, columns, threads);
    out["task_rows"] = cut.task_rows;
    out["task_columns"] = cut.task_columns;
    out["tasks"] = cut.tasks();
  } else {
    out["block_rows"] = kLoraBlockRows;
    out["block_columns"] = kLoraBlockCols;
    out["tasks"] = lora_plan(rows, 1, nullptr).segments.size();
  }
  return out;
}

// Of one adapter, with rows that are aligned.
LoraForward forward_call(int64_t rows, int64_t in, int64_t out, int64_t rank, DType dtype,
                         DType adapter, bool dropout) {
  LoraForward p{};
  p.rows = rows;
  p.in = p.x_row = in;
  p.out = out;
  p.dtype = dtype;
  p.adapters.count = 1;
  p.adapters.dtype = adapter;
  p.adapters.rank = rank;
  p.dropout.threshold = dropout;
  return p;
}

py::dict gpu_plan(int64_t rows, int64_t in, int64_t columns, int64_t rank, const std::string& dtype,
                  const std::string& adapter, int choice, int capability, bool dropout) {
  LoraForward p =
      forward_call(rows, in, columns, rank, dtype_named(dtype), dtype_named(adapter), dropout);
  const auto chosen = static_cast<LoraChoice>(choice);
  p.base = sm80::lora_base(rows, in, p.dtype, true, chosen, capability);
  const LoraBase back = sm80::lora_base(rows, columns, p.dtype, false, chosen, capability);
  const sm80::ForwardPlan plan = sm80::plan_forward(p);
  py::dict out;
  out["base"] = kBases[static_cast<int>(plan.base)];
  out["backward_base"] = kBases[static_cast<int>(back)];
  out["tile_rows"] = plan.tile_rows;
  out["tile_columns"] = plan.tile_columns;
  out["blocks"] = plan.blocks;
  out["shrink_blocks"] = plan.shrink_blocks;
  out["shrink_parts"] = plan.shrink_parts;
  out["launches"] = plan.launches;
  out["workspace_bytes"] = sm80::forward_workspace(p);
  return out;
}

}  // namespace

FK_HOST_BINDINGS(lora)(py::module_& m) {
  m.def("lora_plan", &cpu_plan, py::arg("rows"), py::arg("columns"), py::arg("dtype"),
        py::arg("choice"), py::arg("threads"),
        "Who computes a lora_linear call's base product, and how the call is cut: a dict.");
  m.def("lora_gpu_plan", &gpu_plan, py::arg("rows"), py::arg("depth"), py::arg("columns"),
        py::arg("rank"), py::arg("dtype"), py::arg("adapter") = "float32", py::arg("choice") = 0,
        py::arg("capability") = 80, py::arg("dropout") = false,
        "The same on a GPU of a compute capability, 10 * major + minor. `launches` are our own, "
        "without BLAS's.");
}

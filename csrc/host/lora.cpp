// How a LoRA call is cut, for flashkern.explain.
#include "lora/plan.h"

#include "host/bindings.h"

namespace py = pybind11;

FK_HOST_BINDINGS(lora)(py::module_& m) {
  m.def(
      "lora_plan",
      [](int64_t rows, int64_t columns, const std::string& dtype, int choice, int threads) {
        using namespace flashkern;
        const DType type = dtype == "float32"    ? DType::kFloat32
                           : dtype == "bfloat16" ? DType::kBFloat16
                           : dtype == "float16"  ? DType::kFloat16
                                                 : DType::kFloat64;
        constexpr const char* kNames[] = {"blas", "tiles", "few"};
        const LoraBase base =
            lora_base(rows, type, true, static_cast<LoraChoice>(choice), cpu_facts());
        py::dict out;
        out["base"] = kNames[static_cast<int>(base)];
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
      },
      py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("choice"), py::arg("threads"),
      "Who computes a lora_linear call's base product, and how the call is cut: a dict.");
}

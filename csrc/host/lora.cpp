// How a LoRA call is cut, for flashkern.explain.
#include "lora/plan.h"

#include "host/bindings.h"

namespace py = pybind11;

FK_HOST_BINDINGS(lora)(py::module_& m) {
  m.def(
      "lora_plan",
      [](int64_t rows) {
        const flashkern::LoraPlan plan = flashkern::lora_plan(rows, 1, nullptr);
        py::dict out;
        out["block_rows"] = flashkern::kLoraBlockRows;
        out["block_columns"] = flashkern::kLoraBlockCols;
        out["tasks"] = plan.segments.size();
        return out;
      },
      py::arg("rows"), "The cut of a lora_linear call: a dict.");
}

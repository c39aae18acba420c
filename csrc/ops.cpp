// Every operator's schema, in one table. Read this first: what flashkern gives torch is listed
// here, the functions that run are declared in csrc/torch/<operator>.h. Autograd, fake kernels,
// autocast and vmap rules are Python (flashkern/<operator>.py).
#include <torch/csrc/stable/library.h>

#include <string>

#include "simd/isa.h"
#include "torch/beam.h"

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
      "beam_topk(Tensor logits, Tensor beam_scores, SymInt k, Tensor? logsumexp=None) "
      "-> (Tensor scores, Tensor tokens, Tensor parents, Tensor logsumexp_out)");
}

STABLE_TORCH_LIBRARY_IMPL(flashkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&flashkern::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(flashkern, CPU, m) {
  m.impl("beam_topk", TORCH_BOX(&flashkern::beam_topk_cpu));
}

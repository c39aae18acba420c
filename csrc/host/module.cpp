// flashkern._host: host logic for Python (build facts, plans). No tensor passes through it. Each
// csrc/host/<operator>.cpp registers itself with FK_HOST_BINDINGS.
#include "host/bindings.h"

namespace flashkern {

std::vector<BindFunction>& host_bindings() {
  static std::vector<BindFunction> functions;
  return functions;
}

}  // namespace flashkern

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host logic of flashkern: build facts, CPU ISAs, plans.";
  m.attr("version") = FK_VERSION;
  m.attr("commit") = FK_COMMIT;
  m.attr("isas") = FK_ISAS;
  m.attr("compiler") = FK_COMPILER;
  m.attr("cuda") = FK_CUDA;  // why CUDA kernels are or are not in this build
  for (auto bind : flashkern::host_bindings()) bind(m);
}

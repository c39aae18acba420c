// The SIMD vocabulary for tests/simd: NumPy arrays in, NumPy arrays out, in the ISA that is named.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "host/bindings.h"
#include "simd/check.h"

namespace py = pybind11;

namespace flashkern {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

void use(const std::string& isa) {
  if (!set_isa(isa.c_str())) throw std::invalid_argument("simd: this CPU and build lack " + isa);
}

Floats map(const std::string& isa, const std::string& function, const Floats& in) {
  static const std::map<std::string, SimdFunction> functions = {
      {"exp", SimdFunction::kExp},
      {"exp2_below_zero", SimdFunction::kExp2BelowZero},
      {"tanh", SimdFunction::kTanh},
      {"bfloat16", SimdFunction::kBFloat16},
      {"float16", SimdFunction::kHalf}};
  use(isa);
  Floats out(in.size());
  simd_map({functions.at(function), in.data(), out.mutable_data(), in.size()}, Threads{});
  return out;
}

py::array_t<uint32_t> philox(const std::string& isa, uint64_t key, int64_t begin, int64_t count,
                             uint32_t c1, uint32_t c2, uint32_t c3) {
  use(isa);
  std::vector<uint32_t> words((count + 63) / 64 * 64);
  simd_philox({key, begin, count, c1, c2, c3, words.data()}, Threads{});
  return py::array_t<uint32_t>(count, words.data());
}

// C (+)= A B; A is given transposed where `a_transposed`.
Floats gemm(const std::string& isa, const Floats& a, const Floats& b, const Floats& start,
            bool a_transposed, bool accumulate) {
  use(isa);
  const int64_t rows = start.shape(0), columns = start.shape(1), depth = b.shape(0);
  Floats c({rows, columns});
  std::copy_n(start.data(), rows * columns, c.mutable_data());
  const int64_t a_row = a_transposed ? 1 : depth, a_col = a_transposed ? rows : 1;
  simd_gemm({rows, columns, depth, a.data(), a_row, a_col, b.data(), columns, c.mutable_data(),
             columns, accumulate},
            Threads{});
  return c;
}

// C (+)= scale A B in pairs of bfloat16.
Floats pairs(const std::string& isa, const Floats& a, const Floats& b, const Floats& start,
             float scale, bool accumulate) {
  use(isa);
  const int64_t rows = start.shape(0), columns = start.shape(1), depth = b.shape(0);
  Floats c({rows, columns});
  std::copy_n(start.data(), rows * columns, c.mutable_data());
  simd_pairs({rows, columns, depth, a.data(), b.data(), c.mutable_data(), scale, accumulate},
             Threads{});
  return c;
}

}  // namespace
}  // namespace flashkern

FK_HOST_BINDINGS(simd)(py::module_& m) {
  m.def("simd_map", &flashkern::map, "One function of csrc/simd over an array.");
  m.def("simd_philox", &flashkern::philox, "A run of Philox words.");
  m.def("simd_gemm", &flashkern::gemm, "The micro-GEMM on whole matrices.");
  m.def("simd_pairs", &flashkern::pairs, "The micro-GEMM on bfloat16 in pairs.");
}

// The lane layouts of ldmatrix, stmatrix and mma.sync, as the PTX ISA states them: "Warp-level
// matrix instructions", with g = lane / 4 and t = lane % 4.
#include "emulator/tensor_core.h"

#include <cmath>
#include <cstring>

#include "emulator/convert.h"
#include "emulator/machine.h"
#include "emulator/race.h"

namespace flashkern::emulator {
namespace {

// ---- ldmatrix, stmatrix ----

struct Matrices {
  char* row;
  uint32_t* registers;
  int n;
};

// The 8x8 matrix number i: its rows lie where lanes 8 i .. 8 i + 7 say.
void load_matrix(void* const* lanes, int i, uint16_t (&m)[8][8]) {
  for (int r = 0; r < 8; ++r) {
    std::memcpy(m[r], static_cast<const Matrices*>(lanes[8 * i + r])->row, 16);
  }
}

template <bool kTransposed>
void complete_load(uint32_t, void* const* lanes) {
  const int n = static_cast<const Matrices*>(lanes[0])->n;
  for (int i = 0; i < n; ++i) {
    uint16_t m[8][8];
    load_matrix(lanes, i, m);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = kTransposed ? m[2 * t][g] : m[g][2 * t];
      const uint32_t high = kTransposed ? m[2 * t + 1][g] : m[g][2 * t + 1];
      static_cast<Matrices*>(lanes[lane])->registers[i] = low | high << 16;
    }
  }
}

template <bool kTransposed>
void complete_store(uint32_t, void* const* lanes) {
  const int n = static_cast<const Matrices*>(lanes[0])->n;
  for (int i = 0; i < n; ++i) {
    uint16_t m[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t pair = static_cast<const Matrices*>(lanes[lane])->registers[i];
      (kTransposed ? m[2 * t][g] : m[g][2 * t]) = static_cast<uint16_t>(pair);
      (kTransposed ? m[2 * t + 1][g] : m[g][2 * t + 1]) = static_cast<uint16_t>(pair >> 16);
    }
    for (int r = 0; r < 8; ++r) {
      std::memcpy(static_cast<Matrices*>(lanes[8 * i + r])->row, m[r], 16);
    }
  }
}

bool gives_a_row(int n) { return machine.self->lane < static_cast<uint32_t>(8 * n); }

// ---- mma ----

struct Operands {
  float* d;
  const uint32_t *a, *b;
  int n;
};

const Operands& operands(void* const* lanes, int lane) {
  return *static_cast<const Operands*>(lanes[lane]);
}

// An operand in which rows count for the lane's g and columns for its t: A, or the transpose of B.
// Register r holds row g + 8 (r % (rows / 8)) of column pair t + 4 (r / (rows / 8)).
template <class T, int kRows, const uint32_t* Operands::* kRegisters>
void collect(void* const* lanes, int first, float (&out)[kRows][Layout<T>::kDepth]) {
  using Raw = typename Layout<T>::Raw;
  constexpr int kPair = 4 / sizeof(Raw), kHalf = 4 * kPair, kStack = kRows / 8;
  Raw raw[kRows][Layout<T>::kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* registers = operands(lanes, lane).*kRegisters + first;
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 2 * kStack; ++r) {
      std::memcpy(&raw[g + 8 * (r % kStack)][kPair * t + kHalf * (r / kStack)], &registers[r], 4);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int k = 0; k < Layout<T>::kDepth; ++k) out[i][k] = Layout<T>::to_float(raw[i][k]);
  }
}

// Tensor cores add a product to its float32 sum nearly exactly and then cut it, towards zero: Fasi,
// Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores (2021). Here those of TF32
// do, which stand for float32; the others round, step by step.
template <class T>
struct Summing {
  using Sum = float;
  using Row = float __attribute__((vector_size(32), may_alias));
  static float cut(float x) { return x; }
};
template <>
struct Summing<ptx::Tf32> {
  using Sum = double;
  using Row = double __attribute__((vector_size(64), may_alias));
  static float cut(double x) {
    const auto nearest = static_cast<float>(x);
    return std::abs(nearest) > std::abs(x) ? std::nextafter(nearest, 0.0f) : nearest;
  }
};

template <class T>
void complete_multiply(uint32_t, void* const* lanes) {
  constexpr int kDepth = Layout<T>::kDepth;
  using Sum = typename Summing<T>::Sum;
  using Row = typename Summing<T>::Row;
  float a[16][kDepth];
  collect<T, 16, &Operands::a>(lanes, 0, a);
  const int n = operands(lanes, 0).n;
  for (int strip = 0; strip < n; ++strip) {
    float transposed[8][kDepth];
    collect<T, 8, &Operands::b>(lanes, 2 * strip, transposed);
    alignas(64) Sum b[kDepth][8];
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) b[k][j] = transposed[j][k];
    }
    alignas(32) float d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const float* own = operands(lanes, lane).d + 4 * strip;
      const int g = lane / 4, t = lane % 4;
      std::memcpy(&d[g][2 * t], own, 8);
      std::memcpy(&d[g + 8][2 * t], own + 2, 8);
    }
    for (int i = 0; i < 16; ++i) {
      Row sum;
      for (int j = 0; j < 8; ++j) sum[j] = d[i][j];
      for (int k = 0; k < kDepth; ++k) sum += Sum{a[i][k]} * *reinterpret_cast<const Row*>(b[k]);
      for (int j = 0; j < 8; ++j) d[i][j] = Summing<T>::cut(sum[j]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* own = operands(lanes, lane).d + 4 * strip;
      const int g = lane / 4, t = lane % 4;
      std::memcpy(own, &d[g][2 * t], 8);
      std::memcpy(own + 2, &d[g + 8][2 * t], 8);
    }
  }
}

}  // namespace

void load_matrices(uint32_t* d, int n, const void* row, bool transposed, const Site& site) {
  if (gives_a_row(n)) {
    check_shared(row, 16, 16, "ldmatrix", site);
    on_read(row, 16, "ldmatrix", site);
  }
  Matrices own{const_cast<char*>(static_cast<const char*>(row)), d, n};
  gather("ldmatrix", Collective::kAligned, kAllLanes, &own,
         transposed ? complete_load<true> : complete_load<false>, site);
}

void store_matrices(void* row, int n, const uint32_t* s, bool transposed, const Site& site) {
  if (gives_a_row(n)) {
    check_shared(row, 16, 16, "stmatrix", site);
    on_write(row, 16, "stmatrix", site);
  }
  Matrices own{static_cast<char*>(row), const_cast<uint32_t*>(s), n};
  gather("stmatrix", Collective::kAligned, kAllLanes, &own,
         transposed ? complete_store<true> : complete_store<false>, site);
}

void multiply(Element element, int n, float* d, const uint32_t* a, const uint32_t* b,
              const Site& site) {
  Operands own{d, a, b, n};
  constexpr Complete kComplete[] = {complete_multiply<BFloat16>, complete_multiply<Half>,
                                    complete_multiply<ptx::Tf32>};
  gather("mma", Collective::kAligned, kAllLanes, &own, kComplete[static_cast<int>(element)], site);
}

}  // namespace flashkern::emulator

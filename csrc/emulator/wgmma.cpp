// wgmma. Each warp of the warpgroup owns 16 rows of the product, so each is computed for itself,
// when the warp waits for it: until then its accumulator holds NaN, and what it reads from shared
// memory may still change under it.
#include "emulator/wgmma.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "emulator/convert.h"
#include "emulator/machine.h"
#include "emulator/race.h"

namespace flashkern::emulator {

struct Product {
  Element element;
  int n;
  Operand a, b;
  bool a_in_registers, keep;
  uint32_t group, number;  // of its group; of itself, among all of its warp
  Site site;
  float* d[32];
  uint32_t registers[32][4];
  std::vector<float> sums;  // 16 x n, as they were before
};

namespace {

// Where the 8 elements of an operand's chunk lie: the PTX ISA's "Matrix descriptor". `outer` counts
// rows (K-major) or chunks of 8 rows (MN-major); `k` counts chunks of 8, or single elements.
uint32_t chunk_address(const Operand& operand, uint32_t outer, uint32_t k) {
  const uint64_t bits = operand.descriptor;
  const auto field = [bits](int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const auto swizzle = static_cast<uint32_t>(bits >> 62);
  const uint32_t span = swizzle == 0 ? 16 : 256u >> swizzle, chunks = span / 16;
  uint32_t offset;
  if (!operand.mn_major) {
    offset = outer % 8 * span + outer / 8 * stride + k * (swizzle == 0 ? leading : 16);
  } else if (swizzle == 0) {
    offset = outer * stride + k % 8 * 16 + k / 8 * leading;
  } else {
    offset = outer % chunks * 16 + outer / chunks * leading + k % 8 * span + k / 8 * stride;
  }
  const uint32_t address = start + offset;
  return address ^ (address >> 3 & (span - 16));
}

// Calls visit(row, k, data) for every chunk of rows [first, first + rows) by 16: data[i] is the
// element (row, k + i), or (row + i, k) where the operand is MN-major.
template <class F>
void for_chunks(const Operand& operand, int first, int rows, const Site& site, F visit) {
  const auto load = [&](uint32_t outer, uint32_t k) {
    return static_cast<const uint16_t*>(
        shared_pointer(chunk_address(operand, outer, k), 16, "wgmma", site));
  };
  if (operand.mn_major) {
    for (int row = first; row < first + rows; row += 8) {
      for (int k = 0; k < 16; ++k) {
        visit(row - first, k, load(static_cast<uint32_t>(row / 8), static_cast<uint32_t>(k)));
      }
    }
  } else {
    for (int row = first; row < first + rows; ++row) {
      for (int k = 0; k < 2; ++k) {
        visit(row - first, 8 * k, load(static_cast<uint32_t>(row), static_cast<uint32_t>(k)));
      }
    }
  }
}

float value(Element element, uint16_t bits) {
  return element == Element::kHalf ? Layout<Half>::to_float(bits)
                                   : Layout<BFloat16>::to_float(bits);
}

int first_row() { return static_cast<int>(machine.self->warp->index % 4) * 16; }

void read_a(const Product& p, float (&a)[16][16]) {
  if (!p.a_in_registers) {
    return for_chunks(p.a, first_row(), 16, p.site, [&](int row, int k, const uint16_t* data) {
      for (int i = 0; i < 8; ++i) {
        (p.a.mn_major ? a[row + i][k] : a[row][k + i]) = value(p.element, data[i]);
      }
    });
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      float* pair = &a[g + r % 2 * 8][2 * t + r / 2 * 8];
      pair[0] = value(p.element, static_cast<uint16_t>(p.registers[lane][r]));
      pair[1] = value(p.element, static_cast<uint16_t>(p.registers[lane][r] >> 16));
    }
  }
}

void multiply(Product& p) {
  float a[16][16];
  read_a(p, a);
  std::vector<float> b(16 * static_cast<size_t>(p.n));
  for_chunks(p.b, 0, p.n, p.site, [&](int row, int k, const uint16_t* data) {
    for (int i = 0; i < 8; ++i) {
      const int n = p.b.mn_major ? row + i : row, depth = p.b.mn_major ? k : k + i;
      b[static_cast<size_t>(depth * p.n + n)] = value(p.element, data[i]);
    }
  });
  for (int i = 0; i < 16; ++i) {
    float* sums = &p.sums[static_cast<size_t>(i * p.n)];
    for (int k = 0; k < 16; ++k) {
      const float* row = &b[static_cast<size_t>(k * p.n)];
      for (int j = 0; j < p.n; ++j) sums[j] += a[i][k] * row[j];
    }
  }
}

// Between the lanes' registers and rows of n sums.
template <class F>
void for_registers(const Product& p, F visit) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < p.n / 2; ++r) {
      const int row = lane / 4 + r / 2 % 2 * 8, column = r / 4 * 8 + lane % 4 * 2 + r % 2;
      visit(p.d[lane][r], static_cast<size_t>(row * p.n + column));
    }
  }
}

void land(Warp& warp, size_t i) {
  Product& p = *warp.products[i];
  multiply(p);
  for (size_t later = i + 1; later < warp.products.size(); ++later) {
    Product& next = *warp.products[later];
    if (next.d[0] != p.d[0]) continue;
    if (next.keep) next.sums = std::move(p.sums);
    return;  // the registers stay under way
  }
  for_registers(p, [&](float& d, size_t at) { d = p.sums[at]; });
}

struct Argument {
  Element element;
  int n;
  float* d;
  const uint32_t* registers;
  Operand a, b;
  bool keep;
  const Site* site;
};

// All four warps must issue the same wgmmas.
void check_warpgroup(Warp& warp, const Argument& argument) {
  Warpgroup& group = warp.block->warpgroups[warp.index / 4];
  uint64_t mark = argument.b.descriptor;
  for (const uint64_t part : {argument.a.descriptor, static_cast<uint64_t>(argument.n),
                              static_cast<uint64_t>(argument.site->line())}) {
    mark = (mark ^ part) * 0x9e3779b97f4a7c15u;
  }
  if (warp.issued == group.issued.size()) {
    group.issued.push_back(mark);
  } else if (group.issued[warp.issued] != mark) {
    fail(describe(*machine.self) +
             " is at wgmma: another warp of its warpgroup issued a different "
             "one in its place",
         *argument.site);
  }
  ++warp.issued;
}

void announce_reads(const Product& p, const Warp& warp) {
  if (!race::active) return;
  const race::Access access{"wgmma", p.site};
  const auto visit = [&](int, int, const uint16_t* data) {
    race::read_wgmma(data, 16, access, warp, p.number);
  };
  if (!p.a_in_registers) for_chunks(p.a, first_row(), 16, p.site, visit);
  for_chunks(p.b, 0, p.n, p.site, visit);
}

void issue(uint32_t, void* const* lanes) {
  Warp& warp = *machine.self->warp;
  const auto& first = *static_cast<const Argument*>(lanes[0]);
  if (!warp.fenced) {
    fail(describe(*machine.self) + " is at wgmma without a wgmma_fence since the last wait",
         *first.site);
  }
  check_warpgroup(warp, first);
  auto product = std::make_shared<Product>(Product{first.element,
                                                   first.n,
                                                   first.a,
                                                   first.b,
                                                   first.registers != nullptr,
                                                   first.keep,
                                                   warp.product_group,
                                                   static_cast<uint32_t>(warp.issued),
                                                   *first.site,
                                                   {},
                                                   {},
                                                   {}});
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Argument*>(lanes[lane]);
    if (own.a.descriptor != first.a.descriptor || own.b.descriptor != first.b.descriptor ||
        own.keep != first.keep) {
      fail("wgmma: lanes of a warp differ in their descriptors", *first.site);
    }
    product->d[lane] = own.d;
    if (own.registers != nullptr) std::memcpy(product->registers[lane], own.registers, 16);
  }
  product->sums.resize(static_cast<size_t>(16 * first.n));
  announce_reads(*product, warp);
  for_registers(*product, [&](float& d, size_t at) {
    if (first.keep) product->sums[at] = d;  // NaN where an earlier one is under way: see land()
    d = std::numeric_limits<float>::quiet_NaN();
  });
  warp.products.push_back(std::move(product));
}

void wait(uint32_t, void* const* lanes) {
  Warp& warp = *machine.self->warp;
  const auto left = static_cast<uint32_t>(*static_cast<const int*>(lanes[0]));
  size_t done = 0;
  while (done < warp.products.size() && warp.products[done]->group + left < warp.product_group) {
    land(warp, done);
    race::wgmma_done(warp, warp.products[done]->number);
    ++done;
  }
  warp.products.erase(warp.products.begin(), warp.products.begin() + static_cast<int64_t>(done));
  warp.fenced = false;
}

void commit(uint32_t, void* const*) { ++machine.self->warp->product_group; }
void fence(uint32_t, void* const*) { machine.self->warp->fenced = true; }

}  // namespace

void wgmma(Element element, int n, float* d, const uint32_t* registers, Operand a, Operand b,
           bool keep, const Site& site) {
  Argument own{element, n, d, registers, a, b, keep, &site};
  gather("wgmma", Collective::kAligned, kAllLanes, &own, issue, site);
}

void wgmma_fence(const Site& site) {
  gather("wgmma_fence", Collective::kAligned, kAllLanes, nullptr, fence, site);
}

void wgmma_commit(const Site& site) {
  gather("wgmma_commit", Collective::kAligned, kAllLanes, nullptr, commit, site);
}

void wgmma_wait(int groups_left, const Site& site) {
  gather("wgmma_wait", Collective::kAligned, kAllLanes, &groups_left, wait, site);
}

}  // namespace flashkern::emulator

#include "emulator/tma.h"

#include <bit>
#include <cstring>

#include "emulator/machine.h"
#include "emulator/race.h"
#include "ptx/convert.h"

namespace flashkern::emulator {

struct BulkStore {
  Tensor tensor;
  int32_t at[4];
  const char* shared;
  bool add;
  uint32_t group;
  Site site;
  std::vector<char> tile;  // once it has been read
};

namespace {

uint32_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

uint32_t row_bytes(const Tensor& tensor) { return tensor.box[0] * element_bytes(tensor.dtype); }

uint32_t rows(const Tensor& tensor) {
  uint32_t n = 1;
  for (int i = 1; i < tensor.rank; ++i) n *= tensor.box[i];
  return n;
}

uint32_t tile_bytes(const Tensor& tensor) { return rows(tensor) * row_bytes(tensor); }

// Where byte `offset` of the tile lies. Tiles start at a multiple of the pattern.
uint32_t turned(uint32_t offset, uint32_t span) { return offset ^ (offset >> 3 & (span - 16)); }

// Row `row` of the box at `at`: its address and the elements of it that lie inside the tensor.
struct Row {
  char* data;
  int64_t begin, end;  // of the box's row
};

Row find_row(const Tensor& tensor, const int32_t* at, uint32_t row) {
  char* data = tensor.data;
  for (int i = 1; i < tensor.rank; ++i) {
    const int64_t position = int64_t{at[i]} + row % tensor.box[i];
    row /= tensor.box[i];
    if (position < 0 || position >= static_cast<int64_t>(tensor.extent[i])) return {nullptr, 0, 0};
    data += position * static_cast<int64_t>(tensor.stride[i]);
  }
  const int64_t first = at[0];
  const int64_t begin = first < 0 ? -first : 0;
  const int64_t end =
      std::min<int64_t>(tensor.box[0], static_cast<int64_t>(tensor.extent[0]) - first);
  return {data + first * element_bytes(tensor.dtype), begin, std::max(begin, end)};
}

void read_tile(const Tensor& tensor, const int32_t* at, char* shared) {
  const uint32_t bytes = element_bytes(tensor.dtype), width = row_bytes(tensor);
  std::vector<char> line(width);
  for (uint32_t r = 0; r < rows(tensor); ++r) {
    const Row row = find_row(tensor, at, r);
    std::fill(line.begin(), line.end(), 0);
    if (row.end > row.begin) {
      std::memcpy(line.data() + row.begin * bytes, row.data + row.begin * bytes,
                  static_cast<size_t>((row.end - row.begin) * bytes));
    }
    for (uint32_t c = 0; c < width; c += 16) {
      std::memcpy(shared + turned(r * width + c, tensor.span), line.data() + c, 16);
    }
  }
}

template <class T>
void add_elements(char* to, const char* from, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    T a, b;
    std::memcpy(&a, to + i * sizeof(T), sizeof(T));
    std::memcpy(&b, from + i * sizeof(T), sizeof(T));
    a = ptx::from_float<T>(ptx::to_float(a) + ptx::to_float(b));
    std::memcpy(to + i * sizeof(T), &a, sizeof(T));
  }
}

void write_elements(const BulkStore& store, char* to, const char* from, size_t n) {
  if (!store.add) {
    std::memcpy(to, from, n * element_bytes(store.tensor.dtype));
  } else if (store.tensor.dtype == DType::kFloat32) {
    add_elements<float>(to, from, n);
  } else if (store.tensor.dtype == DType::kBFloat16) {
    add_elements<BFloat16>(to, from, n);
  } else {
    add_elements<Half>(to, from, n);
  }
}

void read_source(BulkStore& store) {
  if (!store.tile.empty()) return;
  const uint32_t bytes = tile_bytes(store.tensor);
  store.tile.resize(bytes);
  for (uint32_t c = 0; c < bytes; c += 16) {
    std::memcpy(&store.tile[c], store.shared + turned(c, store.tensor.span), 16);
  }
  if (race::active) race::read(store.shared, bytes, {"a TMA store", store.site});
}

void write_tensor(BulkStore& store) {
  read_source(store);
  const uint32_t bytes = element_bytes(store.tensor.dtype), width = row_bytes(store.tensor);
  for (uint32_t r = 0; r < rows(store.tensor); ++r) {
    const Row row = find_row(store.tensor, store.at, r);
    if (row.end <= row.begin) continue;
    write_elements(store, row.data + row.begin * bytes,
                   &store.tile[r * width + static_cast<size_t>(row.begin) * bytes],
                   static_cast<size_t>(row.end - row.begin));
  }
}

void check_tile(const void* shared, const Tensor& tensor, int rank, const char* name,
                const Site& site) {
  if (rank != tensor.rank) {
    fail(std::string(name) + ": " + std::to_string(rank) + " coordinates for a tensor of rank " +
             std::to_string(tensor.rank),
         site);
  }
  check_shared(shared, tile_bytes(tensor), std::max(128u, tensor.span > 16 ? 8 * tensor.span : 0),
               name, site);
}

}  // namespace

void check_tensor(const Tensor& tensor) {
  const auto must = [](bool good, const std::string& what) {
    if (!good) throw Error("make_tensor_map: " + what);
  };
  must(tensor.rank >= 2 && tensor.rank <= 4, "rank must be 2 to 4");
  must(tensor.dtype != DType::kFloat64, "dtype must not be float64");
  must(reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0, "data must be 16-byte aligned");
  for (int i = 0; i < tensor.rank; ++i) {
    must(tensor.extent[i] > 0, "extents must be positive");
    must(tensor.stride[i] % 16 == 0, "strides must be multiples of 16 bytes");
    must(tensor.box[i] >= 1 && tensor.box[i] <= 256, "a box has 1 to 256 elements a side");
  }
  must(row_bytes(tensor) % 16 == 0, "a row of the box must be a multiple of 16 bytes");
  must(tensor.span == 16 || row_bytes(tensor) == tensor.span,
       "a row of the box must have as many bytes as its swizzle spans");
}

void load_tile(void* shared, const Tensor& tensor, const int32_t* at, int rank, uint64_t* barrier,
               uint32_t blocks, const Site& site) {
  check_tile(shared, tensor, rank, "tma_load", site);
  const uint32_t own = cluster_rank(), bytes = tile_bytes(tensor);
  if (blocks == 0) blocks = 1u << own;
  struct Destination {
    char* shared;
    uint64_t* barrier;
  };
  std::vector<Destination> destinations;
  for (uint32_t left = blocks; left != 0; left &= left - 1) {
    const auto block = static_cast<uint32_t>(std::countr_zero(left));
    destinations.push_back({static_cast<char*>(in_cluster(shared, block, site)),
                            static_cast<uint64_t*>(in_cluster(barrier, block, site))});
    race::in_flight(destinations.back().shared, bytes, {"a TMA load", site});
    race::barrier_reached(destinations.back().barrier);
    std::memset(destinations.back().shared, 0xff, bytes);
  }
  std::vector<int32_t> where(at, at + rank);
  const auto land = [=, destinations = std::move(destinations), where = std::move(where)] {
    for (const Destination& to : destinations) {
      read_tile(tensor, where.data(), to.shared);
      race::landed(to.shared, bytes, false);
      mbarrier_complete_bytes(to.barrier, bytes, site);
    }
  };
  add_pending(land, site);
  maybe_preempt();
}

void store_tile(const Tensor& tensor, const int32_t* at, int rank, const void* shared, bool add,
                const Site& site) {
  check_tile(shared, tensor, rank, "tma_store", site);
  if (race::active) race::read_async(shared, tile_bytes(tensor), {"a TMA store", site});
  Thread& self = *machine.self;
  auto store = std::make_shared<BulkStore>(
      BulkStore{tensor, {}, static_cast<const char*>(shared), add, self.store_group, site, {}});
  std::copy(at, at + rank, store->at);
  self.stores.push_back(std::move(store));
}

void store_commit() { ++machine.self->store_group; }

void store_wait(int groups_left, bool read_only) {
  Thread& self = *machine.self;
  size_t done = 0;
  for (; done < self.stores.size(); ++done) {
    BulkStore& store = *self.stores[done];
    if (store.group + static_cast<uint32_t>(groups_left) >= self.store_group) break;
    read_source(store);
    if (!read_only) write_tensor(store);
  }
  if (!read_only) {
    self.stores.erase(self.stores.begin(), self.stores.begin() + static_cast<int64_t>(done));
  }
  maybe_preempt();
}

// Copies that nobody waited for never land; a store must have read its source.
void thread_exits(Thread& thread) {
  for (const auto& store : thread.stores) {
    if (store->tile.empty()) {
      fail(describe(thread) + " has returned while its TMA store may still read shared memory",
           store->site);
    }
    write_tensor(*store);
  }
  thread.stores.clear();
}

void forget(Thread& thread) {
  thread.stores.clear();
  thread.copies.clear();
}

}  // namespace flashkern::emulator

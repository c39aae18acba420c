// What this machine can do at best: multiply-adds per second and bytes read per second, on any
// number of threads that start together. The benchmarks measure it in each run and report how near
// a kernel comes. The threads are our own: torch's pool belongs to the operators.
#include <algorithm>
#include <barrier>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "host/bindings.h"
#include "simd/peak.h"

namespace flashkern {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds from the first thread's start of `work(t)` to the last one's end. `ready(t)` runs on
// thread t before all of them start together.
template <class Ready, class Work>
double timed_together(int threads, Ready&& ready, Work&& work) {
  std::barrier line(threads);
  std::vector<std::thread> pool;
  std::vector<Clock::time_point> starts(threads), ends(threads);
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      ready(t);
      line.arrive_and_wait();
      starts[t] = Clock::now();
      work(t);
      ends[t] = Clock::now();
    });
  }
  for (std::thread& thread : pool) thread.join();
  const auto first = *std::min_element(starts.begin(), starts.end());
  const auto last = *std::max_element(ends.begin(), ends.end());
  return std::chrono::duration<double>(last - first).count();
}

void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("roof: threads must be at least 1");
}

double fma_peak(int threads, double seconds, bool pairs) {
  check_threads(threads);
  const Isa isa = active_isa();
  const double flops_of_lane = pairs && isa == Isa::kAvx512Bf16 ? 4 : 2;
  const double flops_of_round = pairs && isa == Isa::kAmxBf16
                                    ? kFlopsOfTile * kPeakTiles
                                    : flops_of_lane * kFmaChains * isa_lanes(isa);
  pybind11::gil_scoped_release release;
  std::vector<float> sinks(threads * 16);  // a cache line each
  const auto run = [&](int64_t rounds) {
    return timed_together(
        threads, [](int) {},
        [&](int t) { fma_loop(FmaParams{rounds, &sinks[t * 16], pairs}, Threads{}); });
  };
  int64_t rounds = 1 << 16;
  double best = 0.0;
  // On a busy machine the time may be over before one run was long enough: one is needed.
  for (const auto end = Clock::now() + std::chrono::duration<double>(seconds);
       best == 0.0 || Clock::now() < end;) {
    const double took = run(rounds);
    if (took < 5e-3) {
      rounds *= 2;  // too short to hide the threads' start
      continue;
    }
    best = std::max(best, flops_of_round * rounds * threads / took);
  }
  return best;
}

double read_peak(int64_t bytes, int threads, double seconds) {
  check_threads(threads);
  const int64_t count = bytes / 4 / threads / 128 * 128;
  if (count < 128) throw std::invalid_argument("roof: bytes must be at least 512 for each thread");
  pybind11::gil_scoped_release release;
  std::vector<std::vector<float>> data(threads);
  std::vector<float> sinks(threads * 16);
  // Enough passes that the difference between the threads' starts is small beside them.
  const int64_t repeats = std::max<int64_t>(1, (int64_t{256} << 20) / bytes);
  double best = 0.0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    const double took = timed_together(
        threads,
        [&](int t) {  // the thread that reads is the one that touches first: its own memory node
          if (data[t].empty()) data[t].assign(count, 1.0f);
          read_loop(ReadParams{data[t].data(), count, 1, &sinks[t * 16]}, Threads{});
        },
        [&](int t) {
          read_loop(ReadParams{data[t].data(), count, repeats, &sinks[t * 16]}, Threads{});
        });
    best = std::max(best, 4.0 * count * repeats * threads / took);
  } while (Clock::now() < end);
  return best;
}

}  // namespace
}  // namespace flashkern

FK_HOST_BINDINGS(roof)(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("fma_peak", &flashkern::fma_peak, py::arg("threads"), py::arg("seconds") = 0.2,
        py::arg("pairs") = false,
        "Best FLOP/s of a loop of multiply-adds in registers, on `threads` threads at once: of "
        "float32, "
        "or of bfloat16 pairs where the ISA in use has them.");
  m.def("read_peak", &flashkern::read_peak, py::arg("bytes"), py::arg("threads"),
        py::arg("seconds") = 0.2,
        "Best bytes/s of reading a working set of `bytes` bytes, split over `threads` threads.");
}

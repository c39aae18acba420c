// Turns of attention's backward pass (csrc/attention/sm80/backward_turns.h), in an order that a
// test gives: an emulated grid runs its blocks one after another, a GPU's may take any.
#include "attention/sm80/backward_turns.h"
#include "guarded.h"
#include "ptx/launch.h"

namespace {

using flashkern::attention::sm80::Turn;

__global__ void take_turns(int* words, const int (*turns)[3], int count) {
  for (int i = 0; i < count; ++i) {
    const Turn turn{words, turns[i][0], turns[i][1], turns[i][2]};
    turn.wait();
    turn.pass();
  }
}

}  // namespace

// turns: (tile, whose turn it is, of how many).
extern "C" __attribute__((visibility("default"))) const char* fk_turns(int* words,
                                                                       const int (*turns)[3],
                                                                       int count) {
  return flashkern::emulator_test::guarded(
      [&] { flashkern::ptx::launch(take_turns, {1, 1}, nullptr, words, turns, count); });
}

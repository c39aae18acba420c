// A warp's collectives: lanes arrive one by one, the last one does the work.
#include <bit>

#include "emulator/machine.h"
#include "emulator/race.h"

namespace flashkern::emulator {
namespace {

[[noreturn]] void clash(const Gathering& open, const char* name, const Site& site,
                        const std::string& why) {
  const Warp& warp = *machine.self->warp;
  const Thread& other = *warp.threads[std::countr_zero(open.arrived)];
  fail(describe(*machine.self) + " is at " + name + ", " + describe(other) + " waits at " +
           open.name + " (" + describe(open.site) + "): " + why,
       site);
}

void check_mask(const char* name, Collective kind, uint32_t mask, const Site& site) {
  const Warp& warp = *machine.self->warp;
  const uint32_t gone =
      mask & (kind == Collective::kConverge ? ~warp.present : ~warp.present | warp.exited);
  if (gone != 0) {
    const bool exists = warp.present & gone;
    fail(describe(*machine.self) + " is at " + name + " with a mask that names lane " +
             std::to_string(std::countr_zero(gone)) +
             (exists ? ", which has returned" : ", which this block does not have"),
         site);
  }
}

// The gathering that the running lane joins: an open one of this mask, or a new one.
Gathering& join(const char* name, Collective kind, uint32_t mask, Complete complete,
                const Site& site) {
  Warp& warp = *machine.self->warp;
  if ((mask >> machine.self->lane & 1) == 0) {
    fail(describe(*machine.self) + " is at " + name + " with a mask that does not name it", site);
  }
  for (Gathering& open : warp.gatherings) {
    if ((open.mask & mask) == 0) continue;
    if (open.complete != complete || open.kind != kind) {
      clash(open, name, site, "a warp's lanes must meet at the same primitive");
    }
    if (open.mask != mask) clash(open, name, site, "the masks differ");
    if (kind == Collective::kAligned && open.site.line() != site.line()) {
      clash(open, name, site, "all lanes must execute the same instruction");
    }
    return open;
  }
  check_mask(name, kind, mask, site);
  return warp.gatherings.emplace_back(Gathering{mask, 0, kind, complete, name, site});
}

}  // namespace

void gather(const char* name, Collective kind, uint32_t mask, void* argument, Complete complete,
            const Site& site) {
  Warp& warp = *machine.self->warp;
  Gathering& open = join(name, kind, mask, complete, site);
  warp.arguments[machine.self->lane] = argument;
  open.arrived |= 1u << machine.self->lane;
  const uint32_t awaited = kind == Collective::kConverge ? mask & ~warp.exited : mask;
  if (open.arrived != awaited) return suspend({.name = name, .site = site});
  if (kind == Collective::kConverge) race::join(warp, awaited);
  if (complete != nullptr) complete(awaited, warp.arguments);
  if (&open != &warp.gatherings.back()) open = warp.gatherings.back();
  warp.gatherings.pop_back();
  wake(&warp, awaited);
  maybe_preempt();
}

}  // namespace flashkern::emulator

"""A pytest plugin: in place of one run of the tests, one for each fault, each in a child process
that ends at the first failure. Everything is imported and collected once.

FLASHKERN_FAULTS names a JSON file: the faults' numbers, the emulator's seed, the CPU seconds that a
fault may cost, and three files. A line of ``out`` for each fault: [number, how it was caught, tab,
by which test, tab, why], "" where it was not. Number 0 is no fault: it must pass, and leaves in
``usual`` the CPU seconds of each test, in ``asked`` the faults that would make a difference there.
Without these two files every fault meets every test.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import resource
import signal
import time
from pathlib import Path

import hypothesis
import pytest

from flashkern import _ops

BROKEN = "the plugin failed"  # which catches no fault

hypothesis.settings.register_profile(
    "faults",
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # no shrinking
    database=None,
    derandomize=True,
)
hypothesis.settings.load_profile("faults")


class FirstFailure:
    """Ends the process at the first test that fails or takes far too long, having said why."""

    def __init__(self, pipe: int, usual: dict[str, float]) -> None:
        self.pipe, self.usual = pipe, usual

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Whoever needs ten times the CPU seconds that the test takes without a fault hangs.

        The first test of a process also pays for what torch imports late: some seconds more.
        """
        signal.setitimer(signal.ITIMER_PROF, 6 + 10 * self.usual.get(nodeid, 30.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else str(report.longrepr)
        said = f"{kind(reason)}\t{report.nodeid}\t{reason[:300]}"
        os.write(self.pipe, said.encode()[:4000])
        os._exit(1)


def kind(reason: str) -> str:
    if "emulator: race" in reason:
        return "race"
    if "emulator: deadlock" in reason:
        return "deadlock"
    return "emulator" if "emulator:" in reason else "wrong result"


class Task:
    """What the file says that FLASHKERN_FAULTS names."""

    def __init__(self) -> None:
        text = json.loads(Path(os.environ["FLASHKERN_FAULTS"]).read_text())
        self.numbers, self.seed, self.budget = text["numbers"], text["seed"], text["budget"]
        self.out, self.usual, self.asked = (Path(text[n]) for n in ("out", "usual", "asked"))

    def chosen(self, items: list[pytest.Item], fault: int) -> list[pytest.Item]:
        """The tests that can see a fault, the quick ones first, as long as the budget lasts."""
        if fault == 0 or not self.asked.exists() or not self.usual.exists():
            return items
        usual, asked = (json.loads(path.read_text()) for path in (self.usual, self.asked))
        items = [item for item in items if fault in asked[item.nodeid]]
        items.sort(key=lambda item: usual[item.nodeid])
        spent = itertools.accumulate(usual[item.nodeid] for item in items)
        return [item for item, sum in zip(items, spent, strict=True) if sum < self.budget]


def run_child(session: pytest.Session, fault: int, task: Task, pipe: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    library = ctypes.CDLL(str(_ops.LIBRARY))
    library.fk_seed(ctypes.c_uint64(task.seed))
    noted = (ctypes.c_ubyte * 8192).in_dll(library, "fk_noted")
    notes = fault == 0 and not task.asked.exists()
    ctypes.c_int.in_dll(library, "fk_fault").value = -1 if notes else fault
    usual = json.loads(task.usual.read_text()) if task.usual.exists() else {}
    session.config.pluginmanager.register(FirstFailure(pipe, usual))
    times, asked = {}, {}
    for item in task.chosen(session.items, fault):
        began = time.process_time()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        times[item.nodeid] = time.process_time() - began
        if notes:
            asked[item.nodeid] = [n for n, was in enumerate(noted) if was]
            ctypes.memset(noted, 0, len(noted))
    if notes:
        task.asked.write_text(json.dumps(asked))
    if fault == 0:
        task.usual.write_text(json.dumps(times))
    os._exit(0)


def outcome(status: int, said: str) -> str:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return "hangs" if name == "SIGPROF" else f"crash\t\t{name}"
    code = os.WEXITSTATUS(status)
    return said if said or code == 0 else f"crash\t\texit {code}"


def run(session: pytest.Session, fault: int, task: Task) -> str:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run_child(session, fault, task, write_end)
        except BaseException as error:
            os.write(write_end, f"{BROKEN}: {error!r}".encode())
        finally:
            os._exit(2)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        said = pipe.read()
    if said.startswith(BROKEN):
        raise RuntimeError(said)
    return re.sub(r"[ \n]+", " ", outcome(os.waitpid(child, 0)[1], said))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    task = Task()
    with open(task.out, "a", buffering=1) as out:
        for fault in task.numbers:
            out.write(json.dumps([fault, run(session, fault, task)]) + "\n")
    return True

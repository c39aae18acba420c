"""The suite of seeded faults: `make test-faults`. Exit status 1 where one goes unseen.

Each fault in turn is put into the CUDA kernels, and the operator's own tests run over the emulator
until one fails: plainly, under the race detector, under AddressSanitizer, with another schedule.
Results are kept in build/faults until the kernels or their tests change: a run that was cut short
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from explained import reason  # noqa: E402
from faults import CSRC, HERE, Fault, plant  # noqa: E402

ROOT = CSRC.parent
BUILD = ROOT / "build" / "faults"
# Variant, seed, CPU seconds of tests for each fault that no pass before has caught.
PASSES = (
    *(("plain", 1, 3), ("race", 1, 20), ("asan", 1, 10)),
    *(("plain", 2, 60), ("race", 2, 60), ("asan", 2, 60)),
)
SAMPLE = (("race", 1, 60),)
ORDER = re.compile(r"no __sync|waits for|wrong lane|relaxed|not atomic")


def call(*command: str | Path, **more: str) -> str:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env={**os.environ, **more}
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(variant: str) -> Path:
    """A folder with the package over a library that holds all faults."""
    folder = BUILD / variant
    package = folder / "package" / "flashkern"
    options = {
        "CMAKE_INSTALL_PREFIX": package,
        "CMAKE_CXX_FLAGS": "-w",
        "FLASHKERN_ISAS": "portable",
        "FLASHKERN_CUDA": "0",
        "FLASHKERN_EMULATED_VARIANT": variant,
        "FLASHKERN_EMULATED_SOURCES": BUILD / "csrc",
        "Python_EXECUTABLE": sys.executable,
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    call("cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *defines)
    call("cmake", "--build", folder, "--target", "flashkern_emulated")
    call("cmake", "--install", folder, "--component", "emulated")
    for source in (ROOT / "flashkern").iterdir():
        link = package / source.name
        if not link.exists() and not source.name.startswith("libflashkern"):
            link.symlink_to(source)
    return package.parent


def digest(operator: str) -> str:
    """Of all that decides whether a fault of the operator is seen."""
    folders = (BUILD / "csrc" / operator, ROOT / "tests" / operator, CSRC / "emulator")
    files = sorted(
        p for f in folders for p in f.rglob("*") if p.suffix in (".h", ".cu", ".py", ".cpp")
    )
    state = hashlib.sha1()
    for path in files:
        state.update(path.read_bytes())
    return state.hexdigest()[:10]


def environment(variant: str, package: Path, task: Path) -> dict[str, str]:
    env = {
        "FLASHKERN_FAULTS": str(task),
        "FLASHKERN_BACKEND": "emulated",
        "PYTHONPATH": f"{package}:{HERE}:{ROOT}",
    }
    if variant == "asan":
        libraries = [
            call("g++", f"-print-file-name={n}").strip() for n in ("libasan.so", "libstdc++.so")
        ]
        env |= {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ":".join(libraries)}
    return env


class Run:
    """One variant of one operator's tests, with one seed: a pytest for each share of the faults."""

    def __init__(self, operator: str, variant: str, seed: int, budget: float) -> None:
        self.operator, self.variant, self.seed, self.budget = operator, variant, seed, budget
        self.stem = f"{operator}-{digest(operator)}"  # results live as long as what they tell of
        self.name = f"{self.stem}-{variant}-{seed}"
        self.usual = BUILD / f"{self.stem}-{variant}.usual"
        self.asked = BUILD / f"{self.stem}.asked"

    def results(self) -> dict[int, str]:
        """How each fault was caught, "" where it was not; of those that have been run."""
        lines = [x for p in BUILD.glob(f"{self.name}-*.jsonl") for x in p.read_text().splitlines()]
        return dict(json.loads(line) for line in lines)

    def learn(self) -> set[int]:
        """Runs the tests without a fault: they must pass. Returns the faults that they can see."""
        if not self.usual.exists() or not self.asked.exists():
            self.start(build(self.variant), [[0]])
            if self.results()[0]:
                raise SystemExit(f"{self.name} fails without a fault: {self.results()[0]}")
        return set().union(*json.loads(self.asked.read_text()).values())

    def run(self, numbers: list[int], jobs: int) -> dict[int, str]:
        package = build(self.variant)
        done = self.results()
        left = [n for n in numbers if n not in done]
        self.start(package, [left[i::jobs] for i in range(jobs)])
        done = self.results()
        return {n: done[n] for n in numbers}

    def start(self, package: Path, shares: list[list[int]]) -> None:
        children = []
        for i, numbers in enumerate(shares):
            if not numbers:
                continue
            stem = BUILD / f"{self.name}-{i}"
            task, out = stem.with_suffix(".task"), stem.with_suffix(".jsonl")
            what = {"numbers": numbers, "seed": self.seed, "budget": self.budget}
            files = {"usual": self.usual, "asked": self.asked, "out": out}
            task.write_text(json.dumps(what | {name: str(path) for name, path in files.items()}))
            options = ("-s", "-p", "plugin", "-p", "no:faulthandler", "-p", "no:cacheprovider")
            tests = ROOT / "tests" / self.operator
            command = [sys.executable, "-m", "pytest", *options, str(tests)]
            env = {**os.environ, **environment(self.variant, package, task)}
            log = open(stem.with_suffix(".log"), "w")  # noqa: SIM115
            children.append(subprocess.Popen(command, cwd=package, env=env, stdout=log, stderr=log))
        if any([child.wait() not in (0, 5) for child in children]):
            raise SystemExit(f"a run of tests ended early: see {BUILD}/{self.name}-*.log")


def sampled(faults: list[Fault], count: int) -> list[Fault]:
    """So many lost barriers, waits and promises of each operator, the same every time."""
    chosen = []
    for operator in dict.fromkeys(f.operator for f in faults):
        own = [f for f in faults if f.operator == operator and ORDER.search(f.what)]
        own = [f for f in own if not reason(f)]
        chosen += [own[i * len(own) // count] for i in range(min(count, len(own)))]
    return chosen


def report(faults: list[Fault], caught: dict[int, str], unseen: set[int]) -> bool:
    """Prints the table; whether every fault is caught or explained."""
    content = True
    for operator in dict.fromkeys(f.operator for f in faults):
        own = [f for f in faults if f.operator == operator]
        ways = collections.Counter(caught.get(f.number, "") for f in own)
        seen = len(own) - ways.pop("", 0)
        print(f"\n{operator}: {seen} of {len(own)} faults caught")
        for way, count in ways.most_common():
            print(f"  {count:5d}  {way}")
        for f in own:
            if f.number in caught:
                continue
            why = reason(f)
            content &= why != ""
            print(f"  {f.path}:{f.line}  {f.what}  [{f.text}]")
            print(f"      {why or 'NOT EXPLAINED'}{' (no test can see it)' * (f.number in unseen)}")
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operators", nargs="*", default=[])
    parser.add_argument("--sample", type=int, default=0, help="so many of each operator, one pass")
    parser.add_argument("--passes", type=int, default=len(PASSES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    faults = plant(BUILD / "csrc")
    operators = args.operators or list(dict.fromkeys(f.operator for f in faults))
    faults = [f for f in faults if f.operator in operators]
    if args.sample:
        faults = sampled(faults, args.sample)
    passes = SAMPLE if args.sample else PASSES[: args.passes]
    caught: dict[int, str] = {}
    unseen: set[int] = set()
    for place, (variant, seed, budget) in enumerate(passes):
        for operator in operators:
            left = [f.number for f in faults if f.operator == operator and f.number not in caught
                    and (place == 0 or not reason(f))]  # fmt: skip
            run = Run(operator, variant, seed, budget)
            if not args.sample:
                unseen |= set(left) - run.learn()
            for number, said in run.run([n for n in left if n not in unseen], args.jobs).items():
                if said:
                    caught[number] = f"{said.split(chr(9))[0]} ({variant})"
    return 0 if report(faults, caught, unseen) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Faults put into copies of the CUDA kernels: what a careless edit would do, found by pattern.

``plant`` copies csrc/<operator>/sm80 and puts a switch at every place where a rule applies
(fault.h): one build holds all faults, and at most one is on.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
NAMES = "flashkern::faults::"

# Calls that may be left out: barriers, waits, fences.
LEFT_OUT = re.compile(
    r"(?:__syncthreads|__syncwarp|__threadfence\w*|ptx::barrier_(?:sync|arrive)|ptx::copy_commit"
    r"|ptx::copy_wait_all|ptx::copy_wait<[^>]+>|ptx::mbarrier_(?:wait|arrive)|ptx::fence_async)"
    r"\("
)
WAITS = re.compile(r"(ptx::(?:copy|wgmma|store)_wait)<([^>]+)>\(\)")
COPIES = re.compile(r"ptx::copy_async<(\w+)>\(")
FUNCTIONS = {
    "min": "is its first argument",
    "max": "is its first argument",
    "fmaxf": "is its first argument",
    "fminf": "is its first argument",
    "__shfl_sync": "of a wrong lane",
    "__shfl_xor_sync": "of a wrong lane",
    "__shfl_up_sync": "of a wrong lane",
    "__shfl_down_sync": "of a wrong lane",
    "__any_sync": "is the lane's own",
    "__all_sync": "is the lane's own",
    "__reduce_max_sync": "is the lane's own",
    "__reduce_min_sync": "is the lane's own",
    "__reduce_add_sync": "is the lane's own",
    "atomicAdd": "is not atomic",
    "add_acquire_release": "is relaxed",
    "add_release": "is relaxed",
    "load_acquire": "is relaxed",
}
CALLS = re.compile(rf"(?<![\w:.])(?:ptx::)?({'|'.join(FUNCTIONS)})\(")
INFIX = {
    "<": "less",
    "<=": "less_equal",
    ">": "greater",
    ">=": "greater_equal",
}
OPERATORS = re.compile(r"(?<= )(<|<=|>|>=)(?= )")
OFFSETS = re.compile(r"(?<=[+-] )\d+(?![\w.])")
STAGES = re.compile(r"\^=? 1\b")
CHOICES = re.compile(r" \? ")
BRANCHES = re.compile(r"\bif \(")
# No kernel code: the preprocessor, template heads, constants.
CONSTANT = re.compile(r"^\s*(?:#|template|using|struct|class)|constexpr|static_assert|asm volatile")


@dataclasses.dataclass(frozen=True)
class Fault:
    number: int
    path: str  # within csrc/
    line: int
    what: str
    text: str  # the line that it is in

    @property
    def operator(self) -> str:
        return self.path.split("/")[0]


@dataclasses.dataclass(frozen=True)
class Edit:
    """Text to insert at, or to put in place of, [begin, end) of a source; {n}: the number."""

    begin: int
    end: int
    new: str
    what: str


def closing(text: str, opening: int) -> int:
    """The position behind the parenthesis that closes the one at ``opening``."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError("unbalanced")


def arguments(text: str, opening: int) -> list[tuple[int, int]]:
    """Where the arguments of a call lie."""
    text = re.sub(r"(?<=\w)<[^<>()]*>", lambda m: "_" * len(m.group()), text)
    found, depth, begin = [], 0, opening + 1
    for i in range(opening, closing(text, opening)):
        depth += {"(": 1, ")": -1, "[": 1, "]": -1}.get(text[i], 0)
        if depth == 0 or (depth == 1 and text[i] == ","):
            found.append((begin, i))
            begin = i + 1
    return found


def code(source: str) -> str:
    """The source with spaces in place of comments, and of lines that are no kernel code.

    Unrolled loops count to a constant: one step more would be undefined C++, whatever it computes.
    """
    text = re.sub(r"//[^\n]*|(?<=#pragma unroll\n).*", lambda m: " " * len(m.group()), source)
    lines = (" " * len(x) if CONSTANT.search(x) else x for x in text.split("\n"))
    return "\n".join(lines)


def edits(text: str) -> Iterator[tuple[Edit, ...]]:
    """Every fault of a source, as the edits that it takes."""
    for m in LEFT_OUT.finditer(text):
        end = closing(text, m.end() - 1)
        call = text[m.start() : end]
        new = f"({NAMES}on({{n}}) ? void() : void({{old}}))"
        yield (Edit(m.start(), end, new, f"no {call}"),)
    for m in WAITS.finditer(text):
        more = f"{m.group(1)}<({m.group(2)}) + 1>()"
        new = f"({NAMES}on({{n}}) ? {more} : {{old}})"
        yield (Edit(m.start(), m.end(), new, f"{m.group()} waits for one less"),)
    for m in COPIES.finditer(text):
        parts = arguments(text, m.end() - 1)
        if len(parts) == 3:
            begin, end = parts[2]
            new = f" {NAMES}choose<int>({{n}},{{old}}, {m.group(1)})"
            yield (Edit(begin, end, new, "cp.async without zeros"),)
    for m in CALLS.finditer(text):
        name = m.group(1)
        new = f"{NAMES}{name}{{{{{{n}}}}}}"
        yield (Edit(m.start(), m.end() - 1, new, f"{name}() {FUNCTIONS[name]}"),)
    for m in OPERATORS.finditer(text):
        op, wrong = m.group(), {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
        new = f"{op} {NAMES}{INFIX[op]}({{n}}) {op}"
        yield (Edit(m.start(), m.end(), new, f"{op} is {wrong[op]}"),)
    for m in OFFSETS.finditer(text):
        sign = text[m.start() - 2]
        new = f"{NAMES}off_by_one({{n}}, {m.group()})"
        yield (Edit(m.start(), m.end(), new, f"{sign} {m.group()} is one less"),)
    for m in STAGES.finditer(text):
        yield (Edit(m.end() - 1, m.end(), f"{NAMES}off_by_one({{n}}, 1)", f"{m.group()} is ^ 0"),)
    for m in CHOICES.finditer(text):
        at = m.start()
        yield (Edit(at, at, f" || {NAMES}on({{n}})", "? : is always the first"),)
    for m in BRANCHES.finditer(text):
        begin, end = m.end(), closing(text, m.end() - 1) - 1
        if re.search(r"(?<![=!<>])=(?!=)", text[begin:end]):
            continue
        close = Edit(end, end, f") && !{NAMES}on({{n}})", "")
        yield (Edit(begin, begin, "(", "if (false)"), close)


def planted(source: str, path: str, first: int) -> tuple[str, list[Fault]]:
    """A source with a switch at each of its faults, and what they are; numbers from ``first``."""
    text, lines, faults, changes = code(source), source.split("\n"), [], []
    for group in edits(text):
        number = first + len(faults)
        line = text.count("\n", 0, group[0].begin) + 1
        faults.append(Fault(number, path, line, group[0].what, lines[line - 1].strip()))
        changes += [(number, edit) for edit in group]
    return apply(source, changes), faults


def apply(source: str, changes: list[tuple[int, Edit]]) -> str:
    """All edits at once. One that lies inside another is made within the latter's old text."""

    def rewritten(begin: int, end: int, inside: list[tuple[int, Edit]]) -> str:
        out, at = "", begin
        inside = sorted(inside, key=lambda c: (c[1].begin, -c[1].end))
        while inside:
            number, edit = inside.pop(0)
            within = [c for c in inside if edit.begin <= c[1].begin and c[1].end <= edit.end]
            if edit.begin == edit.end:
                within = []
            inside = [c for c in inside if c not in within]
            old = rewritten(edit.begin, edit.end, within) if "{old}" in edit.new else ""
            new = edit.new.replace("{n}", str(number)).replace("{old}", "\0")
            new = new.replace("{{", "{").replace("}}", "}").replace("\0", old)
            out += source[at : edit.begin] + new
            at = edit.end
        return out + source[at:end]

    return rewritten(0, len(source), changes)


def plant(folder: Path, csrc: Path = CSRC) -> list[Fault]:
    """Copies of all kernels with their faults, in ``folder``; files that stay the same, stay."""
    faults: list[Fault] = []
    counts: collections.Counter[str] = collections.Counter()
    first = {"attention": 1, "beam": 2001, "lora": 4001}  # numbers outlive another's changes
    for path in sorted(csrc.glob("*/sm80/*")):
        name = str(path.relative_to(csrc))
        operator = name.split("/")[0]
        text, found = planted(path.read_text(), name, first[operator] + counts[operator])
        if path.name.endswith("plan.h"):  # which kernel, how large: no part of what it computes
            text, found = path.read_text(), []
        faults += found
        counts[operator] += len(found)
        head = text.index("#include")
        line = text.count("\n", 0, head) + 1
        write(folder / name, f'{text[:head]}#include "fault.h"\n#line {line}\n{text[head:]}')
    write(folder / "fault.h", (HERE / "fault.h").read_text())
    write(folder / "faults" / "sm80" / "switch.cu", (HERE / "switch.cpp").read_text())
    return faults


def write(path: Path, text: str) -> None:
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

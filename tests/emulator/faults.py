"""Faults put into a kernel's text, one at a time: what a careless edit would do."""

from __future__ import annotations

import re
from collections.abc import Iterator

BARRIERS = (
    r"__syncthreads\(\);",
    r"__syncwarp\([^;]*\);",
    r"ptx::barrier_(?:sync|arrive)\([^;]*\);",
    r"ptx::copy_wait(?:_all|<\d+>)\([^;]*\);",
    r"ptx::mbarrier_(?:wait|arrive)\([^;]*\);",
    r"ptx::wgmma_(?:wait<\d+>|fence)\([^;]*\);",
    r"ptx::fence_async\(\);",
    r"ptx::store_wait(?:_read)?<\d+>\(\);",
)
WAITS = r"(ptx::(?:copy|wgmma|store)_wait(?:_read)?)<(\d+)>"


def line_of(source: str, position: int) -> int:
    return source.count("\n", 0, position) + 1


def removed_barriers(source: str) -> Iterator[tuple[str, str]]:
    """(what was done, the text) for each barrier, wait and fence in turn."""
    for pattern in BARRIERS:
        for found in re.finditer(pattern, source):
            text = source[: found.start()] + ";" + source[found.end() :]
            yield f"line {line_of(source, found.start())}: no {found.group().rstrip(';')}", text


def loosened_waits(source: str) -> Iterator[tuple[str, str]]:
    """Each wait for all but N groups waits for all but N + 1."""
    for found in re.finditer(WAITS, source):
        more = f"{found.group(1)}<{int(found.group(2)) + 1}>"
        text = source[: found.start()] + more + source[found.end() :]
        yield f"line {line_of(source, found.start())}: {more}", text


def replaced(source: str, pairs: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Faults that a pattern cannot find: an index off by one, a tail mask left out, ..."""
    for old, new in pairs:
        assert source.count(old) >= 1, old
        yield f"{old} -> {new}", source.replace(old, new, 1)

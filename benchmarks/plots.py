"""The plots of a report, as PNG files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the back end must be chosen first)

from benchmarks.cells import threads, verdict  # noqa: E402
from benchmarks.results import Row, Run  # noqa: E402
from benchmarks.roof import Roof  # noqa: E402
from benchmarks.sampler import CONTROL, FLASHKERN  # noqa: E402

OWN, PEER, INK, FAINT = "#d9480f", "#1c7ed6", "#343a40", "#ced4da"
_VERDICTS = {"faster": "#2b8a3e", "tie": "#f08c00", "slower": "#c92a2a"}
_PEERS = ("#1c7ed6", "#7048e8", "#0ca678", "#868e96")
_MARKS = {"prefill": "o", "training": "s", "decode": "^", "padded": "D", "varlen": "v", "step": "o"}

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.grid": True,
        "grid.color": "#e9ecef",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "savefig.dpi": 150,
        "savefig.bbox": "tight",
    }
)


def _name(row: Row) -> str:
    return f"{row.info['mode']} {row.info['shape']} {row.info['dtype']}"


def _on(roof: Roof) -> str:
    return "" if roof.gpu else f", {threads(roof.threads)}"


def _speedups(run: Run, rows: list[Row], title: str) -> Any:
    """Bars from 1 to each case's speed-up over its best peer; the grey band is noise."""
    rows = [row for row in rows if row.speedup is not None]
    figure, axes = plt.subplots(figsize=(8.5, 0.6 + 0.24 * len(rows)))
    values = [row.speedup or 1.0 for row in rows]
    colours = [_VERDICTS[verdict(row, run.noise)] for row in rows]
    places = range(len(rows), 0, -1)
    axes.axvspan(1 / (1 + run.noise), 1 + run.noise, color="#f1f3f5", zorder=0)
    axes.barh(places, [v - 1 for v in values], left=1.0, color=colours, height=0.66)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    low, high = min([*values, 0.9]), max([*values, 1.3])
    axes.set_xlim(low / 1.12, high * 1.3)
    marks = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 8, 16, 32, 64, 128)
    ticks = [t for t in marks if low / 1.12 < t < high * 1.3]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    for place, value in zip(places, values, strict=True):
        axes.text(max(value, 1) * 1.02, place, f"{value:.2f}x", va="center", fontsize=8, color=INK)
    operator = [row.info["operator"] for row in rows]
    axes.set_yticks(
        places,
        [
            f"{o} {_name(r)}" if o != "model" else r.info["shape"]
            for o, r in zip(operator, rows, strict=True)
        ],
        fontsize=8,
    )
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    return figure


def _label_some(axes: Any, points: list[tuple[float, float, str]]) -> None:
    """Names the fastest and the slowest point, no more: a cloud of names helps nobody."""
    middle = sorted(x for x, _, _ in points)[len(points) // 2]
    for x, y, text in {max(points, key=lambda p: p[1]), min(points, key=lambda p: p[1])}:
        side, shift = ("left", 6) if x < middle else ("right", -6)
        axes.annotate(
            text, (x, y), (shift, -11), textcoords="offset points", fontsize=7, ha=side, color=INK
        )


def _compute_limits(axes: Any, roof: Roof, right: float) -> None:
    """The roofs of a roofline, each named at the right end."""
    limits = [("cuBLAS" if roof.gpu else "multiply-adds", roof.fma, "-")]
    if roof.bf16 > roof.fma:
        limits.append(("bfloat16 in pairs", roof.bf16, "--"))
    if not roof.gpu:
        limits.append(("torch's matrix product", roof.gemm, ":"))
    for name, rate, line in limits:
        axes.axhline(rate / 1e9, color=INK, linewidth=1, linestyle=line)
        place = rate / 1e9 * (1.06 if rate > roof.gemm else 1 / 1.2)
        text = f"{name}, {rate / 1e9:.0f} GFLOP/s"
        axes.text(right, place, text, ha="right", fontsize=8, color=INK)


def _roofline(run: Run, rows: list[Row], operator: str) -> Any:
    """FLOP/s over FLOPs per byte under the machine's limits; a thin line leads to the best peer."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    roof = run.roofs[rows[0].info["threads"]]
    intensity = [row.info["flops"] / row.info["bytes"] for row in rows]
    left, right = min(intensity) / 2, max(intensity) * 2
    sizes = sorted(roof.read)
    for speed, name in ((roof.read[sizes[-1]], "memory"), (roof.read[sizes[0]], "cache")):
        ridge = roof.fma / speed
        xs = [left, min(max(ridge, left), right)]
        axes.plot(xs, [min(roof.fma, x * speed) / 1e9 for x in xs], color=INK, linewidth=1)
        if ridge > 2 * left:
            axes.annotate(
                f"{name}, {speed / 1e9:.0f} GB/s",
                (left, left * speed / 1e9),
                (6, -1),
                textcoords="offset points",
                fontsize=8,
                color=INK,
            )
    _compute_limits(axes, roof, right)
    points = []
    for row, x in zip(rows, intensity, strict=True):
        y = row.info["flops"] / row.seconds[FLASHKERN] / 1e9
        mark = _MARKS.get(row.info["mode"], "o")
        if row.best_peer:
            peer = row.info["flops"] / row.seconds[row.best_peer] / 1e9
            axes.plot([x, x], [peer, y], color=FAINT, linewidth=1, zorder=1)
            axes.plot(x, peer, mark, mfc="white", color=PEER, markersize=5)
        axes.plot(x, y, mark, color=OWN, markersize=6)
        points.append((x, y, _name(row)))
    _label_some(axes, points)
    axes.plot([], [], "o", color=OWN, label="flashkern")
    axes.plot([], [], "o", mfc="white", color=PEER, label="best peer")
    for mode in dict.fromkeys(row.info["mode"] for row in rows):
        axes.plot([], [], _MARKS.get(mode, "o"), color="#adb5bd", label=mode)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        ylim=(None, max(roof.fma, roof.bf16) / 1e9 * 1.5),
    )
    axes.set(xlabel="FLOPs for each byte of inputs and outputs", ylabel="GFLOP/s")
    axes.set_title(f"{operator}: roofline{_on(roof)}")
    return figure


def _bandwidth(run: Run, rows: list[Row]) -> Any:
    """Beam steps: bytes of logits per second over their size, under what reading alone reaches."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    roof = run.roofs[rows[0].info["threads"]]
    sizes = sorted(roof.read)
    axes.plot(sizes, [roof.read[s] / 1e9 for s in sizes], color=INK, linewidth=1)
    axes.text(
        sizes[0],
        roof.read[sizes[0]] / 1e9 * 1.15,
        "copying" if roof.gpu else "reading, nothing else",
        fontsize=8,
    )
    points = []
    for row in rows:
        x, y = row.info["bytes"], row.info["bytes"] / row.seconds[FLASHKERN] / 1e9
        for peer, seconds in row.peers.items():
            colour = _PEERS[sorted(row.peers).index(peer) % len(_PEERS)]
            axes.plot(x, x / seconds / 1e9, "o", mfc="white", color=colour, markersize=5)
        filled = row.info["dtype"] == "f32"
        axes.plot(x, y, "o" if filled else "s", color=OWN, markersize=6)
        points.append((x, y, row.info["shape"] + " " + row.info["dtype"]))
    _label_some(axes, points)
    axes.plot([], [], "o", color=OWN, label="flashkern, f32")
    axes.plot([], [], "s", color=OWN, label="flashkern, 16 bit")
    names = sorted({name for row in rows for name in row.peers})
    for i, name in enumerate(names):
        axes.plot([], [], "o", mfc="white", color=_PEERS[i % len(_PEERS)], label=name)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="bytes of logits", ylabel="GB/s")
    axes.set_title(f"beam: bandwidth{_on(roof)}")
    return figure


def _by_length(run: Run) -> Any | None:
    """GFLOP/s over sequence length, one panel for each family of prefill shapes."""

    def family(row: Row) -> tuple[Any, ...]:
        i = row.info
        return i["heads"], i["kv_heads"], i["head_dim"], i["batch"], i["causal"], i["dtype"]

    rows = [r for r in run.operators if r.info["operator"] == "attention"]
    rows = sorted((r for r in rows if r.info["mode"] == "prefill"), key=family)
    panels = [
        (key, sorted(group, key=lambda r: r.info["queries"]))
        for key, members in groupby(rows, family)
        if len(group := list(members)) >= 3
    ]
    if not panels:
        return None
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (max(7.0, 3.4 * columns), 3.4 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((heads, kv, dim, _, causal, dtype), members) in zip(grid.flat, panels, strict=False):
        roof = run.roofs[members[0].info["threads"]]
        axes.axhline(roof.fma / 1e9, color=INK, linewidth=0.8, linestyle=":")
        names = [n for n in members[-1].seconds if n != CONTROL]
        for i, name in enumerate(names):
            shown = [r for r in members if name in r.seconds]
            axes.plot(
                [r.info["queries"] for r in shown],
                [r.info["flops"] / r.seconds[name] / 1e9 for r in shown],
                "o-",
                color=OWN if name == FLASHKERN else _PEERS[(i - 1) % len(_PEERS)],
                markersize=4,
                linewidth=2 if name == FLASHKERN else 1.2,
                label=name,
            )
        ticks = [r.info["queries"] for r in members]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, None)
        group = f"{heads}" if heads == kv else f"{heads}/{kv}"
        axes.set_title(f"H{group} D{dim} {dtype}{' causal' if causal else ''}")
        axes.set_xlabel("sequence length")
    grid[0][0].set_ylabel("GFLOP/s (dotted: the fma limit)")
    grid[0][0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def _by_threads(run: Run) -> Any | None:
    """Speed over the number of threads, relative to one thread of the best peer."""
    panels = []
    for case, members in groupby(sorted(run.scaling, key=_name), _name):
        full = [r for r in run.operators if _name(r) == case]
        panels.append((case, sorted([*members, *full], key=lambda r: r.info["threads"])))
    panels = [(case, rows) for case, rows in panels if len(rows) > 1]
    if not panels:
        return None
    size = (max(7.0, 3.2 * len(panels)), 3.2)
    figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axes, (case, rows) in zip(grid[0], panels, strict=True):
        counts = [r.info["threads"] for r in rows]
        peer = rows[0].best_peer
        base = rows[0].seconds[peer or FLASHKERN]
        own = [base / r.seconds[FLASHKERN] for r in rows]
        axes.plot(counts, own, "o-", color=OWN, linewidth=2, label="flashkern")
        ideal = [own[0] * c / counts[0] for c in counts]
        axes.plot(counts, ideal, ":", color=INK, linewidth=0.8, label="in proportion")
        if peer:
            shown = [
                (c, base / r.seconds[peer])
                for c, r in zip(counts, rows, strict=True)
                if peer in r.seconds
            ]
            axes.plot(*zip(*shown, strict=True), "o-", color=PEER, linewidth=1.2, label=peer)
        axes.set_xticks(counts)
        axes.set_ylim(0, None)
        axes.set_title(case, fontsize=8)
        axes.set_xlabel("threads")
        axes.legend(fontsize=7)
    grid[0][0].set_ylabel("speed (1: the peer on one thread)")
    figure.tight_layout()
    return figure


def _beam_search(found: dict[str, Any]) -> Any:
    """Left: the time of a step by part. Right: what the cache holds after each step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 2.6))
    names = list(found["contenders"])
    colours = (FAINT, "#f08c00", INK)
    for place, name in enumerate(names):
        begin = 0.0
        for (part, seconds), colour in zip(
            found["contenders"][name]["parts"].items(), colours, strict=True
        ):
            label = part if place == 0 else None
            left.barh(place, 1e3 * seconds, left=begin, color=colour, label=label, height=0.6)
            begin += 1e3 * seconds
        held = [size / 2**20 for size in found["contenders"][name]["held"]]
        right.plot(held, color=OWN if name == FLASHKERN else PEER, label=name)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set_xlabel("ms")
    left.set_title("A step of beam search")
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncol=3)
    right.set_ylim(0, None)
    right.set_xlabel("step")
    right.set_ylabel("MiB")
    right.set_title("What its cache holds")
    right.legend(fontsize=7)
    return figure


def _figures(run: Run) -> Iterator[tuple[str, Any]]:
    if run.models:
        yield "models", _speedups(run, run.models, "Real models: speed-up over torch")
    if run.beam_search:
        yield "beam-search", _beam_search(run.beam_search)
    if run.operators:
        yield "speedups", _speedups(run, run.operators, "Operators: speed-up over the best peer")
    yield "attention-length", _by_length(run)
    for operator in ("attention", "lora"):
        rows = [row for row in run.operators if row.info["operator"] == operator]
        if rows:
            yield f"roofline-{operator}", _roofline(run, rows, operator)
    rows = [row for row in run.operators if row.info["operator"] == "beam"]
    if rows:
        yield "roofline-beam", _bandwidth(run, rows)
    yield "threads", _by_threads(run)


def draw(run: Run, folder: Path) -> list[Path]:
    """Writes every plot that the run has data for into `folder`; returns the files in order."""
    written = []
    for name, figure in _figures(run):
        if figure is None:
            continue
        path = folder / f"{name}.png"
        figure.savefig(path)
        plt.close(figure)
        written.append(path)
    return written

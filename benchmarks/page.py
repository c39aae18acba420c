"""The report as one HTML page that needs nothing beside it: tables, plots, machine, method."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from benchmarks import bars
from benchmarks import cells as words
from benchmarks.results import Row, Run

_STYLE = """
:root { --ink: #212529; --faint: #868e96; --line: #e9ecef; --own: #d9480f; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0 auto;
       max-width: 1120px; padding: 2rem 1.2rem 5rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
p.sub { color: var(--faint); margin: .2rem 0 1.4rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; }
.tile { flex: 1 1 10.5rem; border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.5rem; font-weight: 650; }
.tile span { color: var(--faint); font-size: .87rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
        font-size: .86rem; white-space: nowrap; }
th { text-align: left; color: var(--faint); font-weight: 500; border-bottom: 1px solid #adb5bd; }
th, td { padding: .28rem .7rem .28rem 0; } td { border-bottom: 1px solid var(--line); }
td.r, th.r { text-align: right; } td.wrap { white-space: normal; }
tr.head td { font-weight: 650; padding-top: 1rem; border-bottom: 1px solid #adb5bd; }
.faster { color: #2b8a3e; font-weight: 650; } .slower { color: #c92a2a; font-weight: 650; }
.tie { color: #e67700; font-weight: 650; }
img { max-width: 100%; display: block; margin: 1.2rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .9rem; }
dt { color: var(--faint); } dd { margin: 0; } .note { color: var(--faint); font-size: .9rem; }
code { font-size: .92em; }
"""

_METHOD = """
Every provider of a shape is called in turn, round after round, so that all of them see the same
machine; a time is the median of its rounds. <b>Speed-up</b> is the best peer's time over
flashkern's. flashkern runs twice in each round: how far it is from itself is the <b>noise</b>, and
a difference inside the noise is called level. <b>Of limit</b> is the least time that the machine
could take (the larger of FLOPs over the multiply-add limit and bytes over the read limit for a
working set of that size, both measured in this run) over flashkern's time. FLOPs count what the
mathematics needs, half when causal; bytes count every input and output once. <b>Error</b> is the
root mean square of the difference from the float64 result over that of the result, beside the
most exact torch form in the same dtype.
"""


def _cell(text: str, column: str, extra: str = "") -> str:
    names = " ".join(filter(None, ["r" if column in words.RIGHT else "", extra]))
    return f'<td class="{names}">{html.escape(text)}</td>'


def _head(columns: tuple[str, ...]) -> str:
    cells = (f'<th class="{"r" if c in words.RIGHT else ""}">{c}</th>' for c in columns)
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _row(run: Run, row: Row, columns: tuple[str, ...]) -> str:
    shown = words.cells(row, run.noise) | {
        "task": row.info["shape"],
        "result": words.quality_cells(row),
    }
    verdict = words.verdict(row, run.noise)
    cells = []
    for column in columns:
        extra = verdict if column == "speed-up" else "wrap" if column == "result" else ""
        cells.append(_cell(shown[column], column, extra))
    times = ", ".join(f"{n} {s * 1e3:.3g} ms" for n, s in row.seconds.items())
    return f'<tr title="{html.escape(times)}">{"".join(cells)}</tr>'


def _operators(run: Run) -> str:
    parts, before = [], None
    for row in [*run.operators, *run.scaling]:
        section = row.info["operator"] + (", fewer threads" if row.info["scaling"] else "")
        if section != before:
            parts.append(f'<tr class="head"><td colspan="8">{section}</td></tr>')
            before = section
        parts.append(_row(run, row, words.COLUMNS))
    return f"<table>{_head(words.COLUMNS)}<tbody>{''.join(parts)}</tbody></table>"


def _models(run: Run) -> str:
    columns = ("task", "flashkern", "best peer", "speed-up", "rate", "result")
    rows = "".join(_row(run, row, columns) for row in run.models)
    return f"<table>{_head(columns)}<tbody>{rows}</tbody></table>"


def _tiles(run: Run) -> str:
    tiles = []
    for name, rows in (("operator shapes", run.operators), ("model tasks", run.models)):
        judged = sorted((r for r in rows if r.speedup), key=lambda r: r.speedup or 0.0)
        if not judged:
            continue
        kept = sum(words.verdict(r, run.noise) != "slower" for r in judged)
        middle = judged[len(judged) // 2].speedup
        span = f"from {judged[0].speedup:.2f}x to {judged[-1].speedup:.2f}x"
        tiles.append((f"{middle:.2f}x", f"median speed-up over {len(judged)} {name}, {span}"))
        tiles.append((f"{kept} of {len(judged)}", f"{name} at least level with the best peer"))
    tiles.append((f"{100 * run.noise:.1f}%", "noise: flashkern against itself in the same rounds"))
    return "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in tiles)


def _machine(run: Run) -> str:
    machine = run.record["machine"]
    gpu = machine["gpu"]
    facts = {
        "processor": f"{machine['cpu']['model']}, {machine['cores']} cores, "
        f"{machine['cpu']['mhz']} MHz, caches "
        + ", ".join(f"{k} {v}" for k, v in machine["caches"].items()),
        "memory": f"{machine['memory_gib']} GiB",
        "GPU": ", ".join(f"{k} {v}" for k, v in gpu.items()) if gpu else "none",
        "kernels": f"{machine['isa']} (torch: {machine['torch_isa']}), "
        f"{machine['threads']} threads, {machine['clock']} clock",
        "versions": ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v),
        "commit": f"{machine['commit']}{' with changes' if machine['dirty'] else ''}",
        "load when done": f"{machine['load'][0]} (more than the threads: others were running)",
        "command": run.record["command"],
    }
    facts |= {
        f"limits, {'GPU' if r.gpu else words.threads(t)}": words.limits(r).split(": ", 1)[1]
        for t, r in run.roofs.items()
    }
    pairs = (f"<dt>{k}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _bars(run: Run) -> str:
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in bars.lines(run))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<h2>Bars</h2><div class=scroll><table>{_head(bars.COLUMNS)}{body}</table></div>"


def _beam_search(run: Run, plots: list[Path]) -> str:
    found = run.beam_search
    if not found:
        return ""
    contenders = found["contenders"]
    parts = next(iter(contenders.values()))["parts"]
    head = "".join(
        f'<th class="r">{html.escape(p)}</th>' for p in ("prompt", *parts, "share of the reorder")
    )
    rows = []
    for name, own in contenders.items():
        times = [own["prompt"], *own["parts"].values()]
        cells = [f"{1e3 * t:.3g} ms" for t in times]
        share = own["parts"]["reorder of the cache"] / sum(own["parts"].values())
        cells.append(f"{100 * share:.2g}%")
        rows.append(f"<tr><td>{name}</td>{''.join(f'<td class=r>{c}</td>' for c in cells)}</tr>")
    pictures = "".join(_image(p) for p in plots if p.stem == "beam-search")
    return f"""<h2>Beam search: {found["beams"]} beams behind {found["prompt"]} tokens</h2>
<p class="note">The prompt's pass, then each step: the model's pass, the reorder of its cache, and
all else. Below, what the beams that came back have in common.</p>
<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>{"".join(rows)}</table></div>
{pictures}<pre>{html.escape(found["tree"])}</pre>"""


def _missing(run: Run) -> str:
    reasons = {(n, r) for found in run.record["missing"].values() for n, r in found.items()}
    if not reasons:
        return ""
    items = "".join(f"<li>{html.escape(n)}: {html.escape(r)}</li>" for n, r in sorted(reasons))
    return f'<h2>Left out</h2><ul class="note">{items}</ul>'


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'


def write(run: Run, plots: list[Path], path: Path) -> None:
    """Writes the page to `path`, with `plots` inside it."""
    machine = run.record["machine"]
    models = f"<h2>Real models</h2><div class=scroll>{_models(run)}</div>" if run.models else ""
    path.write_text(
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>flashkern benchmarks</title>
<style>{_STYLE}</style></head><body>
<h1>flashkern {machine["versions"]["flashkern"]}</h1>
<p class="sub">{html.escape(run.processor)}, {machine["cores"]} cores,
{machine["isa"]}; torch {machine["versions"]["torch"]}; profile {run.record["profile"]},
{run.date[:16].replace("T", " ")} UTC, {run.record["seconds"]:.0f} s</p>
<div class="tiles">{_tiles(run)}</div>
{_bars(run)}{models}
{_beam_search(run, plots)}
<h2>Operators</h2><div class="scroll">{_operators(run)}</div>
<p class="note">Hold the pointer over a row to see the time of every provider.
= marks a difference inside the noise.</p>
<h2>Plots</h2>{"".join(_image(p) for p in plots if p.stem != "beam-search")}
<h2>How to read this</h2><p>{_METHOD}</p>
<h2>Machine</h2>{_machine(run)}
{_missing(run)}
</body></html>
""",
        encoding="utf-8",
    )

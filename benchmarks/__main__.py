"""The benchmarks from a shell: run them, write a report again, compare two result files."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from benchmarks import gpu, results
from benchmarks.clock import CLOCKS
from benchmarks.profiles import PROFILES

_HERE = Path(__file__).resolve().parent
_WIDEST = 150  # columns that the table needs: a narrower terminal would cut its cells


def _console() -> Any:
    from rich.console import Console

    plain = Console()
    return Console(width=max(plain.width, _WIDEST))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, print the table, write the report")
    run.add_argument("--profile", default="quick", choices=sorted(PROFILES))
    run.add_argument("--out", type=Path, default=Path("reports"), help="folder for the report")
    run.add_argument("--only", metavar="WORDS", help="cases with this in their name (pytest -k)")
    run.add_argument("--no-models", action="store_true", help="leave the real models out")
    run.add_argument(
        "--clock",
        default="wall",
        choices=sorted(CLOCKS),
        help="cpu: CPU time, for a busy machine; needs --threads 1",
    )
    run.add_argument("--threads", type=int, default=0, help="0: one for each core")
    run.add_argument("--scale", type=float, default=1.0, help="of the seconds for each case")
    device = commands.add_parser("gpu", help="the profile gpu-quick, into results/<gpu>/")
    device.add_argument("--seconds", type=float, default=500.0, help="for all cases together")
    device.add_argument("--out", type=Path, help="folder instead of benchmarks/results/<gpu>")
    device.add_argument("--only", metavar="WORD", default="", help="cases with this in their name")
    device.add_argument(
        "--rehearse",
        action="store_true",
        help="small shapes on the CPU by the wall clock: tries everything but the GPU",
    )
    report = commands.add_parser("report", help="write the report of a result file again")
    report.add_argument("results", type=Path)
    report.add_argument("--out", type=Path, default=Path("reports"))
    report.add_argument("--readme", type=Path, help="also put the tables into this file")
    both = commands.add_parser("compare", help="show what moved beyond noise")
    both.add_argument("before", type=Path)
    both.add_argument("after", type=Path)
    return parser


def write_report(source: Path, out: Path, console: Any) -> None:
    """Prints the table of a result file and writes CSV, plots and the page into `out`."""
    from benchmarks import cells, page, plots, table

    run = results.load(source)
    out.mkdir(parents=True, exist_ok=True)
    table.show(run, console)
    cells.write_csv(run, out / "results.csv")
    page.write(run, plots.draw(run, out), out / "index.html")
    console.print(f"\nreport: {(out / 'index.html').resolve()}", highlight=False)


def _run(options: argparse.Namespace) -> int:
    import pytest

    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    target = out / "results.json"
    target.unlink(missing_ok=True)
    arguments = [
        str(_HERE / "test_operators.py"),
        *([] if options.no_models else [str(_HERE / "models" / "test_models.py")]),
        f"--rootdir={_HERE.parent}",
        f"--benchmark-json={target}",
        f"--bench-profile={options.profile}",
        f"--bench-clock={options.clock}",
        f"--bench-threads={options.threads}",
        f"--bench-scale={options.scale}",
        "--capture=no",
        "-p",
        "no:cacheprovider",
        *(["-k", options.only] if options.only else []),
    ]
    # What pytest prints (every statistic of every provider) goes to a file; the bar goes to stderr.
    with (out / "pytest.log").open("w") as log, contextlib.redirect_stdout(log):
        status = pytest.main(arguments)
    if not target.exists():
        print(f"benchmarks: nothing was measured; see {out / 'pytest.log'}", file=sys.stderr)
        return int(status) or 1
    write_report(target, out, _console())
    return int(status)


def main() -> int:
    options = _parser().parse_args()
    try:
        if options.command == "run":
            return _run(options)
        if options.command == "gpu":
            return gpu.run(options.seconds, options.out, options.only, options.rehearse)
        if options.command == "report":
            write_report(options.results, options.out, _console())
            if options.readme:
                from benchmarks import markdown

                text = markdown.markdown(results.load(options.results), str(options.results))
                markdown.replace(options.readme, text)
            return 0
        from benchmarks import compare

        before, after = results.load(options.before), results.load(options.after)
        compare.show(compare.compare(before, after), _console())
        return 0
    except (OSError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

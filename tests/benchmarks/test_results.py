"""From result files to reports and comparisons, on made-up times."""

import csv
import io
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from rich.console import Console

from benchmarks import cells, compare, markdown, page, plots, results, table
from benchmarks.__main__ import main
from benchmarks.sampler import FLASHKERN

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    ("attention", "S128", 2): {FLASHKERN: 0.010, "torch sdpa": 0.020, "torch eager": 0.050},
    ("attention", "S256", 2): {FLASHKERN: 0.010, "torch sdpa": 0.0101, "torch eager": 0.020},
    ("attention", "S512", 2): {FLASHKERN: 0.010, "torch sdpa": 0.008, "torch eager": 0.010},
    ("attention", "S512", 1): {FLASHKERN: 0.020, "torch sdpa": 0.016, "torch eager": 0.020},
    ("lora", "r8", 2): {FLASHKERN: 0.010, "peft": 0.015},
    ("beam", "4 beams", 2): {FLASHKERN: 0.001, "transformers": 0.010},
    ("model", "MiniLM", 2): {FLASHKERN: 0.100, "torch sdpa": 0.150},
}


def _scaled(cases, factor, only=None):
    """The same cases with every time (or flashkern's time of the case `only`) times `factor`."""
    return {
        key: {n: t * factor if only is None or (key[1] == only and n == FLASHKERN) else t
              for n, t in seconds.items()}
        for key, seconds in cases.items()
    }  # fmt: skip


def test_rows_name_the_best_peer_and_the_limit(result_file):
    run = results.load(result_file("a.json", CASES, noise=0.02))
    first = run.operators[0]
    assert first.best_peer == "torch sdpa"
    assert first.speedup == pytest.approx(2.0)
    assert first.rate() == (pytest.approx(100.0), "GFLOP/s")
    # 1e9 FLOPs at 2e11 a second take 5 ms, half of the 10 ms measured.
    assert first.share == pytest.approx(0.5) and first.limit[1] == "fma"
    assert run.noise == pytest.approx(0.02)
    assert [cells.verdict(r, run.noise) for r in run.operators[:3]] == ["faster", "tie", "slower"]
    assert [len(run.operators), len(run.scaling), len(run.models)] == [5, 1, 1]


def test_report_shows_every_case(result_file, tmp_path):
    run = results.load(result_file("a.json", CASES))
    out = io.StringIO()
    table.show(run, Console(file=out, width=150))
    text = out.getvalue()
    assert "2.00x" in text and "50% fma" in text and "0.80x" in text
    assert "similarity 0.5 = torch's" in text and "beamgrad: is not installed" in text

    cells.write_csv(run, tmp_path / "r.csv")
    lines = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(lines) == sum(len(seconds) + 1 for seconds in CASES.values())
    assert float(lines[0]["median_s"]) == pytest.approx(0.010)

    drawn = plots.draw(run, tmp_path)
    names = {path.stem for path in drawn}
    assert names == {"models", "beam-search", "speedups", "attention-length", "roofline-attention",
                     "roofline-lora", "roofline-beam", "threads"}  # fmt: skip
    page.write(run, drawn, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert text.count("data:image/png;base64,") == len(drawn)
    assert "a &lt;CPU&gt;" in text and 'src="http' not in text and "href" not in text


def test_report_tells_of_beam_search(result_file, tmp_path):
    run = results.load(result_file("a.json", CASES))
    page.write(run, plots.draw(run, tmp_path), tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert "4 beams behind 256 tokens" in text and "+- a &lt;b&gt;" in text
    assert "<td class=r>2.5%</td>" in text  # 1 of 40 ms
    assert 'alt="beam-search"' in text


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a file that"):
        results.load(tmp_path / "x.json")


def test_compare_takes_the_machine_off(result_file):
    before = results.load(result_file("a.json", CASES))
    after = results.load(result_file("b.json", _scaled(CASES, 1.5)))
    result = compare.compare(before, after)
    assert result.drift == pytest.approx(1.5)
    assert not any(case.moved for case in result.cases)


def test_compare_finds_the_one_that_moved(result_file):
    before = results.load(result_file("a.json", CASES))
    slower = _scaled(_scaled(CASES, 1.2, only="r8"), 1.1)
    result = compare.compare(before, results.load(result_file("b.json", slower)))
    assert [c.case for c in result.cases if c.moved] == ["r8 2t"]
    moved = next(c for c in result.cases if c.moved)
    assert moved.ratio == pytest.approx(1.2)


def test_compare_keeps_still_within_noise(result_file):
    """A change of 5% is news in a quiet run and none where flashkern is 10% from itself."""
    changed = _scaled(CASES, 1.05, only="r8")
    quiet = [
        results.load(result_file("a.json", CASES)),
        results.load(result_file("b.json", changed)),
    ]
    assert sum(c.moved for c in compare.compare(*quiet).cases) == 1
    loud = results.load(result_file("c.json", changed, noise=0.1))
    assert sum(c.moved for c in compare.compare(quiet[0], loud).cases) == 0


def test_compare_from_a_shell(result_file, monkeypatch, capsys):
    a, b = result_file("a.json", CASES), result_file("b.json", _scaled(CASES, 2, only="4 beams"))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "compare", str(a), str(b)])
    assert main() == 0
    shown = capsys.readouterr().out
    assert "2.00x slower" in shown and "1 of 7 cases moved" in shown
    monkeypatch.setattr(sys, "argv", ["benchmarks", "compare", str(a), "/nowhere.json"])
    assert main() == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_readme_gets_the_tables(result_file, tmp_path):
    path = result_file("a.json", CASES)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    text = markdown.markdown(results.load(path), "a.json")
    markdown.replace(readme, text)
    whole = readme.read_text()
    assert whole.startswith("before\n") and whole.endswith("after\n") and "old" not in whole
    assert "| MiniLM | 100 ms | 150 ms torch sdpa | 1.50x | similarity 0.5 = torch's |" in whole
    assert whole.count("\n| attention ") == 3 and "(a.json)" in whole
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="must hold"):
        markdown.replace(readme, text)


def test_readme_shows_the_committed_results():
    """README's tables are those of the file that it names."""
    whole = (ROOT / "README.md").read_text()
    shown = whole.split(markdown.BEGIN)[1].split(markdown.END)[0].strip()
    source = re.search(r"From \[(\S+)\]", shown)
    assert source is not None
    assert shown == markdown.markdown(results.load(ROOT / source[1]), source[1])

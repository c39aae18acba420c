"""Result files as `python -m benchmarks run` writes them, made from given times."""

import json

import pytest

from benchmarks.sampler import CONTROL, FLASHKERN

_SECTIONS = {"attention": "prefill", "lora": "training", "beam": "step", "model": "embed"}


def _entry(case, operator, provider, role, seconds, threads, index):
    info = {
        "operator": operator, "mode": _SECTIONS[operator], "shape": case, "dtype": "f32",
        "threads": threads, "scaling": threads == 1, "case": f"{case} {threads}t",
        "provider": provider, "role": role, "flops": 0 if operator == "beam" else 10**9,
        "bytes": 0 if operator == "model" else 10**7,
        "units": {"texts": 4.0} if operator == "model" else {}, "clock": "wall",
        "queries": 128 << index, "heads": 8, "kv_heads": 8, "head_dim": 64, "batch": 1,
        "causal": True,
    }  # fmt: skip
    if operator == "model":
        info["quality"] = {"similarity": 0.5}
    elif role != "control":
        info["error"] = 1e-7
    stats = {"median": seconds, "iqr": seconds / 100, "rounds": 9, "data": [seconds] * 9}
    return {"extra_info": info, "stats": stats}


@pytest.fixture
def result_file(tmp_path):
    """Writes a result file: seconds by provider for each case, all else made up."""

    def write(name, cases, noise=0.004):
        entries = []
        for index, ((operator, case, threads), seconds) in enumerate(cases.items()):
            own = {FLASHKERN: seconds[FLASHKERN], CONTROL: seconds[FLASHKERN] * (1 + noise)}
            for provider, time in (seconds | own).items():
                roles = {FLASHKERN: FLASHKERN, CONTROL: "control"}
                role = roles.get(provider, "peer")
                entries.append(_entry(case, operator, provider, role, time, threads, index))
        read = {str(1 << power): 2e10 for power in range(17, 29)}
        machine = {
            "cpu": {"model": "a <CPU>", "mhz": 3000}, "caches": {"L1": "32K"}, "cores": 2,
            "memory_gib": 8, "system": "Linux", "threads": 2, "clock": "wall", "isa": "avx2",
            "torch_isa": "AVX2", "gpu": None, "python": "3.11", "load": [0.1, 0.1, 0.1],
            "versions": {"flashkern": "1.0", "torch": "2.13"}, "commit": "abc", "dirty": False,
        }  # fmt: skip
        roofs = [{"threads": t, "fma": 1e11 * t, "gemm": 8e10, "read": read} for t in (1, 2)]
        record = {"profile": "quick", "seconds": 1.0, "machine": machine, "roofs": roofs}
        record |= {"missing": {"beam": {"beamgrad": "is not installed"}}, "command": "run"}
        parts = {"model": 0.03, "reorder of the cache": 0.001, "selection and the rest": 0.009}
        one = {"prompt": 0.2, "parts": parts, "held": [1 << 20, 2 << 20]}
        record["beam_search"] = {
            "beams": 4, "prompt": 256, "tree": "+- a <b>",
            "contenders": {FLASHKERN: one, "transformers": one},
        }  # fmt: skip
        path = tmp_path / name
        data = {"flashkern": record, "benchmarks": entries, "datetime": "2026-01-01T00:00:00"}
        path.write_text(json.dumps(data))
        return path

    return write

"""Where a beam search spends its time and how much its cache holds, step by step.

One search of the beam-search task for each contender, in turn, a few rounds: the model's forward
passes and the cache's reorders are timed from inside, the rest is selection and bookkeeping.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from benchmarks.models.tasks import SDPA, TRANSFORMERS, beam_setup, switch
from benchmarks.sampler import FLASHKERN

ROUNDS = 3
PARTS = ("model", "reorder of the cache", "selection and the rest")


class _Watch:
    """The clock readings of one search."""

    def __init__(self) -> None:
        self.forward: list[float] = []
        self.reorder: list[float] = []
        self.held: list[int] = []  # bytes of the cache after each forward pass

    def timed(self, call: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            into.append(time.perf_counter() - begin)
            return result

        return wrapped


def _held(cache: Any) -> int:
    """Bytes of the tensors that a cache keeps."""
    names = ("shared_k", "shared_v", "own_k", "own_v", "keys", "values")
    total = 0
    for layer in cache.layers:
        own = [
            getattr(layer, n) for n in names if isinstance(getattr(layer, n, None), torch.Tensor)
        ]
        stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own[:4]}
        total += sum(stored.values())
    return total


@contextlib.contextmanager
def _watched(model: Any, watch: _Watch) -> Iterator[None]:
    from transformers.cache_utils import Cache

    from flashkern.integrations.transformers import BeamCache

    forward = model.forward
    kept = [(kind, kind.reorder_cache) for kind in (Cache, BeamCache)]
    timed = watch.timed(forward, watch.forward)

    @functools.wraps(forward)
    def measured(*args: Any, **kwargs: Any) -> Any:
        outputs = timed(*args, **kwargs)
        watch.held.append(_held(outputs.past_key_values))
        return outputs

    model.forward = measured
    for kind, reorder in kept:
        kind.reorder_cache = watch.timed(reorder, watch.reorder)
    try:
        yield
    finally:
        del model.forward
        for kind, reorder in kept:
            kind.reorder_cache = reorder


def _search(model: Any, search: Callable[..., Any], name: str) -> dict[str, Any]:
    watch = _Watch()
    switch(model, FLASHKERN if name == FLASHKERN else SDPA)()
    with _watched(model, watch):
        begin = time.perf_counter()
        search(own=name == FLASHKERN)
        whole = time.perf_counter() - begin
    prompt, *steps = watch.forward
    spent = [sum(steps), sum(watch.reorder)]
    spent.append(whole - prompt - sum(spent))
    parts = dict(zip(PARTS, (seconds / len(steps) for seconds in spent), strict=True))
    return {"prompt": prompt, "parts": parts, "held": watch.held}


def measure(full: bool) -> dict[str, Any]:
    """What the report's page of beam search shows; seconds for each step, bytes after each."""
    import flashkern as fk

    setup = beam_setup(full)
    names = (FLASHKERN, TRANSFORMERS)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            found[name].append(_search(setup.model, setup.search, name))
    switch(setup.model, FLASHKERN)()
    out = setup.search(own=True, num_return_sequences=setup.beams, output_scores=True,
                       return_dict_in_generate=True)  # fmt: skip
    tree = fk.beam.draw(
        out.sequences,
        scores=out.sequences_scores,
        decode=setup.tokenizer.decode,
        start=setup.prompt,
    )
    return {
        "beams": setup.beams,
        "prompt": setup.prompt,
        "contenders": {
            name: {
                "prompt": median(run["prompt"] for run in runs),
                "parts": {p: median(run["parts"][p] for run in runs) for p in PARTS},
                "held": runs[-1]["held"],
            }
            for name, runs in found.items()
        },
        "tree": tree,
    }

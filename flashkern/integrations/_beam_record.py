"""What ``return_dict_in_generate`` asks a beam search to keep of each step, and to return."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashkern.integrations._beam_sets import Beams


def cache_name(model_kwargs: dict[str, Any]) -> str | None:
    """The keyword under which a model takes its cache, where it has one."""
    from transformers.generation.utils import ALL_CACHE_NAMES

    return next((name for name in ALL_CACHE_NAMES if name in model_kwargs), None)


class Record:
    """The steps' scores, logits, attentions and hidden states, as far as they are wanted."""

    def __init__(self, model: Any, config: Any, model_kwargs: dict[str, Any]) -> None:
        self.config, self.encoder_decoder = config, model.config.is_encoder_decoder
        asked = config.return_dict_in_generate
        self.wants_scores = bool(asked and config.output_scores)
        self.scores: tuple[Tensor, ...] | None = () if self.wants_scores else None
        self.steps: dict[str, tuple[Any, ...]] = {}
        self.encoder: dict[str, Any] = {}
        if not asked:
            return
        names: list[str] = ["logits"] if config.output_logits else []
        names += self._names("attentions") if config.output_attentions else []
        names += self._names("hidden_states") if config.output_hidden_states else []
        self.steps = {name: () for name in names}
        if self.encoder_decoder:
            encoder = model_kwargs["encoder_outputs"]
            for name in ("attentions", "hidden_states"):
                wanted = getattr(config, f"output_{name}")
                self.encoder[f"encoder_{name}"] = encoder.get(name) if wanted else None

    def _names(self, what: str) -> list[str]:
        if not self.encoder_decoder:
            return [what]
        return [f"decoder_{what}"] + (["cross_attentions"] if what == "attentions" else [])

    def add(self, outputs: Any, logits: Tensor, log_probs: Tensor | None) -> None:
        """Keeps a step: the model's outputs and the processed log-probabilities."""
        if self.scores is not None and log_probs is not None:
            self.scores += (log_probs.clone(),)
        for name in self.steps:
            value = logits.float().clone() if name == "logits" else getattr(outputs, name)
            self.steps[name] += (value,)

    def finish(self, finished: Beams, prompt: int, model_kwargs: dict[str, Any]) -> Any:
        """The finished beams, best first, cut to the longest; as transformers returns them."""
        count = self.config.num_return_sequences
        tokens, scores, parents = (value[:, :count].flatten(0, 1) for value in finished[:3])
        generated = int((parents >= 0).sum(1).max())
        sequences = tokens[:, : prompt + generated]
        if not self.config.return_dict_in_generate:
            return sequences
        from transformers.generation import utils

        name = cache_name(model_kwargs)
        kind = "EncoderDecoder" if self.encoder_decoder else "DecoderOnly"
        return getattr(utils, f"GenerateBeam{kind}Output")(
            sequences=sequences,
            sequences_scores=scores if self.config.output_scores else None,
            scores=self.scores,
            beam_indices=parents[:, :generated],
            past_key_values=None if name is None else model_kwargs[name],
            **self.steps,
            **self.encoder,
        )

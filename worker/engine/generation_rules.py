"""Rules of a checkpoint's generation_config.json beyond plain greedy decoding.

Stock `generate` applies that file silently. Here its rules apply on every path, and each result lists those that
applied to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

#: Results show a longer list as its length only.
MAX_LIST_ENTRIES = 8
#: Rules that change the next token's scores, each with its neutral values.
SCORE_RULES: Mapping[str, tuple[Any, ...]] = {
    "sequence_bias": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
}
#: Rules that do not depend on a prompt, nor on the padding before it.
NEW_TOKEN_RULES = frozenset({
    "min_new_tokens",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
})  # fmt: skip
#: Defaults of sampled jobs.
SAMPLING_RULES: Mapping[str, tuple[Any, ...]] = {
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}
#: Rules of beam search, which stock `generate` runs.
BEAM_RULES: Mapping[str, tuple[Any, ...]] = {
    "length_penalty": (None, 1.0),
    "early_stopping": (None, False),
    "renormalize_logits": (None, False),
}
#: Other decoding methods. A checkpoint that asks for one of them is not served.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "stop_strings": (None, []),
    "token_healing": (None, False),
    "top_h": (None,),
}


class UnsupportedGeneration(ValueError):
    """A generation_config.json asks for a decoding method that is not served. The message names the keys to remove."""


@dataclass(frozen=True, slots=True)
class GenerationRules:
    """A checkpoint's rules under transformers' names, without neutral ones."""

    scores: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    beams: Mapping[str, Any] = field(default_factory=dict)

    @property
    def depend_on_padding(self) -> bool:
        """Whether stock `generate` would score a prompt in another way if it is padded."""
        return not self.scores.keys() <= NEW_TOKEN_RULES

    def without_bad_words(self, bad_words_ids: Sequence[list[int]]) -> GenerationRules:
        """The rules without those bad words that no answer contains anyway."""
        words = [word for word in self.scores.get("bad_words_ids", ()) if word not in bad_words_ids]
        return replace(self, scores=_set({**self.scores, "bad_words_ids": words}, SCORE_RULES))

    def abbreviated(self) -> GenerationRules:
        """The rules for a result, with each long list replaced by its length."""
        return GenerationRules(*(
            {name: _brief(value) for name, value in rules.items()}
            for rules in (self.scores, self.sampling, self.beams)
        ))  # fmt: skip


def _brief(value: Any) -> Any:
    return f"{len(value):,} entries" if isinstance(value, Sized) and len(value) > MAX_LIST_ENTRIES else value


NO_RULES = GenerationRules()


def generation_rules(config: Mapping[str, Any]) -> GenerationRules:
    """The rules in a generation config. Raises UnsupportedGeneration."""
    refused = _set(config, UNSUPPORTED)
    if refused:
        raise UnsupportedGeneration(
            f"its generation_config.json asks for {', '.join(refused)}, which is not served: remove that."
        )
    scores = _set(config, SCORE_RULES)
    if "min_new_tokens" in scores:
        # As in stock `generate`, which then ignores `min_length`.
        scores.pop("min_length", None)
    return GenerationRules(scores, _set(config, SAMPLING_RULES), _set(config, BEAM_RULES))


def _set(config: Mapping[str, Any], rules: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {name: config[name] for name, neutral in rules.items() if config.get(name) not in neutral}

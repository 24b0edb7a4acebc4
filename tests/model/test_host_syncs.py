"""How often the host waits for the device: once a decode step. Counted on a CPU, where each wait is a read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.conftest import IN_SLOTS, Served, noise
from tests.model.jobs import prepared
from worker.engine.generation_rules import SCORE_RULES
from worker.engine.logits_processors import RowRules
from worker.engine.pauses import without_pauses
from worker.engine.row import Row, Sampling, Tokens

#: Calls that read a tensor's content on the host, and make it wait on a GPU.
READS = {"tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
#: Operators that do, in recorded graphs, too. In inference mode torch does not show that of a single number, which the
#: calls above count.
OPERATORS = {"nonzero", "equal", "masked_select", "_unique2", "repeat_interleave", "allclose"}
STEPS = 12


class Transfers:
    """Counts what a block reads from tensors on the host, and the tensors that it makes of the host's numbers."""

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()
        self.uploads = 0
        self._modes = _Calls(self), _Operators(self)

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Calls(TorchFunctionMode):
    def __init__(self, transfers: Transfers) -> None:
        super().__init__()
        self._transfers = transfers

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.__name__ in READS:
            self._transfers.reads[function.__name__] += 1
        self._transfers.uploads += function is torch.tensor
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, transfers: Transfers) -> None:
        super().__init__()
        self._transfers = transfers

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in OPERATORS or (name in ("index", "index_put_") and _has_mask(args[1])):
            self._transfers.reads[name] += 1
        return function(*args, **(kwargs or {}))


def _has_mask(indices: Sequence[torch.Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor[0].item(),
        lambda tensor: float(tensor[0]),
        lambda tensor: bool(tensor[0]),
        lambda tensor: int(tensor[0]),
        lambda tensor: range(9)[tensor[0].long()],
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.nonzero(),
        lambda tensor: torch.equal(tensor, tensor),
        lambda tensor: tensor.numpy(),
    ],
)
@pytest.mark.parametrize("inference", [True, False])
def test_each_kind_of_read_is_counted_once(read: Callable[[torch.Tensor], Any], inference: bool) -> None:
    tensor = torch.ones(3)
    with torch.inference_mode(inference), Transfers() as transfers:
        tensor.add_(tensor.sum())
        assert not transfers.reads
        read(tensor)
    assert transfers.reads.total() == 1


#: Greedy rows, rows that sample in every way, and both side by side.
BATCHES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}] * 4,
    "sampled": [{"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.9}, {"temperature": 2.0, "top_k": 5}],
    "penalties": [{"repetition_penalty": 1.2}, {}, {"presence_penalty": 0.5, "logit_bias": ((7, 1.0),)}],
    "log-probabilities": [{"logprobs": 5}, {}, {"logprobs": 20}, {"logprobs": 0}],
    "mixed": [{}, {"temperature": 1.0, "top_p": 0.5, "top_k": 20}, {}, {"temperature": 1.0}],
}


def transfers_by_step(served: Served, options: Sequence[dict[str, Any]]) -> list[tuple[Counter[str], int]]:
    """The reads and the uploads of the prefill with the first step, and of each further step."""
    prompt = prepared(served.model, [served.images[min(served.images)], "Say what this is."])
    rows = [Row(prompt, Sampling(STEPS + 1, seed=seed, **each)) for seed, each in enumerate(options)]
    totals: list[tuple[Counter[str], int]] = [(Counter(), 0)]
    with Transfers() as transfers:
        served.model.run(rows, lambda: totals.append((transfers.reads.copy(), transfers.uploads)), lambda running: ())
    assert all(len(row.output.result().ids) == STEPS + 1 for row in rows)
    return [(now[0] - then[0], now[1] - then[1]) for then, now in itertools.pairwise(totals)]


#: Each kind of decoder, in both layouts.
DECODERS = ["with resampler", "idefics2 chat", "with resampler, in blocks", "smolvlm chat, in blocks"]


@pytest.mark.parametrize("served", DECODERS, indirect=True)
@pytest.mark.parametrize("name", BATCHES)
def test_the_host_reads_once_in_each_decode_step(served: Served, name: str) -> None:
    options = BATCHES[name]
    # Records the graphs of these shapes, which are compared with their functions once.
    transfers_by_step(served, options)
    prefill, *steps = transfers_by_step(served, options)
    assert len(steps) == STEPS - 1
    # The step's tokens and lengths; the sampled rows' numbers, the penalized rows' last tokens, or which rows ask.
    uploads = 1 if name == "greedy" else 2
    assert steps == [({"tolist": 1}, uploads)] * len(steps)
    reads, uploads = prefill
    # The prompts' first tokens, and those of the step after them.
    assert reads == {"tolist": 2}
    assert uploads <= 16


@pytest.mark.parametrize("served", DECODERS, indirect=True)
def test_the_host_reads_a_batchs_labels_once(served: Served) -> None:
    prompt = prepared(served.model, [served.images[min(served.images)], "Say what this is."])
    labels = tuple((5 + n, 6 + n, 7) for n in range(4))

    def reads() -> Counter[str]:
        rows = [Row(prompt, Sampling(1), labels) for _ in range(3)]
        with Transfers() as transfers:
            served.model.run(rows, lambda: None, lambda running: ())
        assert all(row.output.result().probabilities for row in rows)
        return transfers.reads

    reads()
    assert reads() == {"tolist": 1}


#: Each rule of a checkpoint's generation config, with a value that changes scores at each step.
RULES: dict[str, Any] = {
    "sequence_bias": [[[5], 1.0], [[5, 6], -1.0]],
    "encoder_repetition_penalty": 2.0,
    "repetition_penalty": 2.0,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[7], [8, 9]],
    "min_length": 60,
    "min_new_tokens": 60,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (2, 1.01),
    "suppress_tokens": [10, 11],
    "begin_suppress_tokens": [12],
}


@pytest.mark.parametrize("name", SCORE_RULES)
def test_a_rule_of_the_checkpoint_reads_nothing_from_the_device(name: str) -> None:
    row = Row(Tokens((3, 4, 5, 6, 5)), Sampling(STEPS, eos_ids=frozenset({2})))
    rules = RowRules(row, {name: RULES[name]}, torch.device("cpu"))
    scores = torch.randn(50)
    # A processor prepares its tensors at the first step.
    rules.apply([], scores.clone())
    with Transfers() as transfers:
        for new in ([5], [5, 6]):
            rules.apply(new, scores.clone())
    assert not transfers.reads
    # The new tokens, and those that an n-gram bans.
    assert transfers.uploads <= 2 * 2


@pytest.mark.parametrize("served", IN_SLOTS, indirect=True)
def test_pictures_are_encoded_without_a_read_from_the_device(served: Served) -> None:
    picture = served.model.codec.picture(noise(100))

    def reads(number: int) -> Counter[str]:
        unseen = replace(picture, key=picture.key + bytes([number]))
        with Transfers() as transfers:
            without_pauses(served.model.encode([unseen]))
        return transfers.reads

    # Records the graph of this shape, and compares it once.
    reads(0)
    found = reads(1)
    if served.is_first_family:
        assert found == {}
        return
    # Of the frames' masks, which are in the host's memory: whether there is padding, and in Idefics2 how much in each
    # direction.
    is_idefics2 = served.model.info.family == "idefics2"
    assert found.pop("__int__", 0) == (2 * len(picture.frames) if is_idefics2 else 0)
    # In Idefics2, after frames of two sizes, the connector runs operation by operation, and transformers reads its
    # mask. The engine does not wait for that, since the encoder has a stream of its own.
    assert found.pop("__bool__") in ((1, 2) if is_idefics2 else (1,))
    assert not found

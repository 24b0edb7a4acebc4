"""The engine on a GPU, in bfloat16, with random weights in a published checkpoint's shape.

`python -m benchmarks.gpu --family idefics3 --save gpu-idefics3`. With keys and values in slots and in blocks, and with
decode steps launched directly and as recorded CUDA graphs:

- a decode step at 1, 16 and 64 rows, against the time that the card needs to read the weights and the rows' keys and
  values once, and against a step of stock `generate`;
- a step of the whole engine, which also chooses tokens: alone, and while pictures are encoded; and its host gap, the
  part of it in which the GPU has nothing to do;
- prefill: tokens a second, against the card's peak;
- encoding: pictures and frames a second, from bytes in the host's memory.

`--tiny --device cpu` runs the same code without a GPU; there is neither a host gap then nor a bound.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_models import SHAPES, TINY, Card, Measured, card
from benchmarks.measures import RESULTS
from worker.engine.blocks import blocks_for
from worker.engine.continuous import ContinuousModel
from worker.engine.cuda_graphs import CudaGraphs
from worker.engine.decoder import SlotDecoder
from worker.engine.next_tokens import NextTokens
from worker.engine.pauses import without_pauses
from worker.engine.row import Picture, Row, Sampling, Tokens
from worker.engine.token_masks import TokenMasks

ROWS = (1, 16, 64)
PICTURES = (1, 8, 32)
STEPS = 32
#: Tokens of the measured prefills, and least tokens of a prompt.
PREFILL_TOKENS, PROMPT_TOKENS = 4096, 256
#: Repetitions, after one that is not measured.
REPEATS = 5


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median time of a run, until the device has done its work."""
    times = []
    for _ in range(REPEATS + 1):
        settle(device)
        started = time.perf_counter()
        run()
        settle(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def settle(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that the GPU's kernels take in a run; 0 on a CPU."""
    settle(device)
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as profiled:
        run()
        settle(device)
    return float(sum(event.self_device_time_total for event in profiled.key_averages())) / 1e6


@dataclass(frozen=True)
class Setup:
    """A model with its keys and values in one layout, and with CUDA graphs or without."""

    measured: Measured
    layout: str
    graphs: bool
    prompt: Tokens
    features: Mapping[bytes, Tensor]

    @property
    def device(self) -> torch.device:
        return self.measured.device

    def options(self, rows: int) -> dict[str, Any]:
        """Arguments of SlotDecoder and of ContinuousModel for this many rows, which all grow by twice the measured
        steps of the longest row."""
        tokens = len(self.prompt.ids) + 2 * (rows + (REPEATS + 2) * STEPS)
        size = self.measured.model.decoder.family.spec.block_tokens
        return {
            "record": CudaGraphs() if self.graphs else None,
            "blocks": (rows + 1) * blocks_for(tokens, size) if self.layout == "blocks" else 0,
        }

    def decoder(self, rows: int) -> SlotDecoder:
        """A decoder with a prefilled prompt in each of its slots."""
        decoder = SlotDecoder(self.measured.model.decoder.family, 2**20, **self.options(rows))
        for _ in range(rows):
            self.prefill(decoder, 1)
        return decoder

    def prefill(self, decoder: SlotDecoder, prompts: int) -> Sequence[int]:
        """Prefill prompts. Returns their slots."""
        return decoder.prefill([decoder.pending(self.prompt, None, self.features)] * prompts)[0]

    def model(self, rows: int) -> ContinuousModel:
        """The whole engine's model, which prefills each prompt at once and shares no prefixes."""
        of = self.measured.model
        return ContinuousModel(of.stock, of.decoder.family, of.encode, 0, chunk_tokens=2**20, **self.options(rows))


def setups(measured: Measured) -> Iterator[Setup]:
    """Those that the device supports."""
    prompt = measured.prompt(PROMPT_TOKENS)
    features = without_pauses(measured.model.encode(prompt.pictures))
    for layout, graphs in itertools.product(("slots", "blocks"), (False, True)):
        if measured.device.type == "cuda" or not graphs:
            yield Setup(measured, layout, graphs, prompt, features)


@torch.inference_mode()
def decode_step_s(setup: Setup, rows: int) -> tuple[float, float]:
    """The time of a step of the decoder, and that of the GPU's kernels in a step that also chooses tokens."""
    decoder, choose = setup.decoder(rows), NextTokens([], setup.device, TokenMasks((), setup.device)).choose

    def steps(*, choosing: bool) -> None:
        for _ in range(STEPS):
            logits = decoder.step([7] * rows)
            if choosing:
                choose(logits, {})

    step_s = seconds(functools.partial(steps, choosing=False), setup.device) / STEPS
    return step_s, busy_s(functools.partial(steps, choosing=True), setup.device) / STEPS


def decode_step(setup: Setup, rows: int, bound: Card | None) -> dict[str, Any]:
    """Milliseconds of a step of the decoder, and of the engine."""
    # One after the other, since the caches of both may not fit on the device.
    step_s, busy = decode_step_s(setup, rows)
    model = setup.model(rows)
    engine_s = engine_step_s(model, setup.prompt, rows)
    seen = [setup.measured.picture(seed) for seed in range(1, 1 + PICTURES[-1])]
    model.prefetch(seen, lambda cached: None)
    encoding_s = engine_step_s(model, setup.prompt, rows)
    least = setup.measured.step_bytes(rows, len(setup.prompt.ids)) / bound.bandwidth if bound else None
    return {
        "rows": rows,
        "layout": setup.layout,
        "graphs": setup.graphs,
        "step_ms": milliseconds(step_s),
        "least_ms": milliseconds(least),
        "of_bandwidth": least and round(least / step_s, 3),
        "engine_step_ms": milliseconds(engine_s),
        "engine_step_ms_while_encoding": milliseconds(encoding_s),
        "host_gap_ms": milliseconds(engine_s - busy) if busy else None,
    }


def engine_step_s(model: ContinuousModel, prompt: Tokens, rows: int) -> float:
    """The median time of a step of the engine with this many running rows."""
    times: list[float] = []

    def admit(running: Sequence[Row]) -> Sequence[Row]:
        if len(running) == rows:
            times.append(time.perf_counter())
        return ()

    # The first row may have as many steps as there are rows before the last one joins.
    model.run([Row(prompt, Sampling(rows + STEPS)) for _ in range(rows)], lambda: None, admit)
    return statistics.median(after - before for before, after in itertools.pairwise(times))


@torch.inference_mode()
def stock_step_ms(setup: Setup, rows: int) -> float | None:
    """A step of stock `generate`: the time for STEPS tokens less the time for one."""
    inputs = setup.measured.stock_inputs(rows, len(setup.prompt.ids))

    def generate(tokens: int) -> float:
        options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
        return seconds(lambda: setup.measured.network.generate(**inputs, **options), setup.device)

    return milliseconds((generate(STEPS) - generate(1)) / (STEPS - 1))


def prefill(setup: Setup, bound: Card | None) -> dict[str, Any]:
    """Tokens a second of prompts that are prefilled together."""
    tokens = len(setup.prompt.ids)
    prompts = max(1, PREFILL_TOKENS // tokens)
    decoder = SlotDecoder(setup.measured.model.decoder.family, 2**20, **setup.options(prompts))
    taken_s = seconds(lambda: decoder.release(setup.prefill(decoder, prompts)), setup.device)
    flops = setup.measured.prefill_flops(prompts, tokens) / taken_s
    return {
        "layout": setup.layout,
        "prompts": prompts,
        "prompt_tokens": tokens,
        "tokens_per_s": round(prompts * tokens / taken_s),
        "of_peak": round(flops / bound.flops, 3) if bound else None,
    }


def encoding(measured: Measured, count: int) -> dict[str, Any]:
    """Pictures and frames a second, scaled before."""
    pictures: Sequence[Picture] = [measured.picture(seed) for seed in range(count)]
    turns = itertools.count()

    def encode() -> None:
        # With keys of their own, so that none is cached.
        turn = str(next(turns)).encode()
        without_pauses(measured.model.encode([replace(each, key=each.key + turn) for each in pictures]))

    taken_s = seconds(encode, measured.device)
    frames = sum(len(picture.frames) for picture in pictures)
    return {"pictures": count, "per_s": round(count / taken_s, 2), "frames_per_s": round(frames / taken_s, 2)}


def milliseconds(value_s: float | None) -> float | None:
    """Seconds as rounded milliseconds."""
    return None if value_s is None else round(1000 * value_s, 3)


def measure(measured: Measured) -> dict[str, Any]:
    """All figures."""
    device = measured.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    bound, each = card(name), list(setups(measured))
    spec = measured.model.decoder.family.spec
    return {
        "device": name,
        "torch": torch.__version__,
        "family": measured.model.info.family,
        "parameters": sum(parameter.numel() for parameter in measured.network.parameters()),
        "block_tokens": spec.block_tokens,
        "decode_steps": [decode_step(setup, rows, bound) for setup in each for rows in ROWS],
        "stock_step_ms": {rows: stock_step_ms(each[0], rows) for rows in ROWS},
        "prefill": [prefill(setup, bound) for setup in each if not setup.graphs],
        "encoding": [encoding(measured, count) for count in PICTURES],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(SHAPES), default="idefics")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the script")
    parser.add_argument("--save", help="the name of the file in results/")
    asked = parser.parse_args()
    shapes = TINY if asked.tiny else SHAPES
    figures = measure(Measured.new(shapes[asked.family], asked.device))
    print(json.dumps(figures, indent=2))
    if asked.save:
        (RESULTS / f"{asked.save}.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The engine on a GPU: idefics-9b's shape with random weights in bf16. `python -m benchmarks.gpu --save gpu`.

Milliseconds of a decode step at 1, 16 and 64 rows, launched directly and as recorded CUDA graphs, compared with the
time that the GPU needs to read the weights once (the lower bound) and with a step of stock `generate` in the same
process; images a second of the vision tower and resampler.
`--tiny --device cpu` runs the same code without a GPU, for its own test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from benchmarks.measures import RESULTS
from worker.engine.cuda_graphs import CudaGraphs
from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import PendingPrompt
from worker.models.idefics1.decoder import IdeficsDecoder, IdeficsSegment

ROWS = (1, 16, 64)
PROMPT_TOKENS, STEPS = 64, 32
#: Bytes a second that a card reads from its memory, by a part of its name.
BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}
IMAGE_ID = 5


def idefics_9b() -> IdeficsConfig:
    """The shape of HuggingFaceM4/idefics-9b: 8.93 billion parameters."""
    vision = {"embed_dim": 1280, "image_size": 224, "patch_size": 14, "intermediate_size": 5120,
              "num_hidden_layers": 32, "num_attention_heads": 16}  # fmt: skip
    perceiver = {"resampler_n_latents": 64, "resampler_depth": 6, "resampler_n_heads": 16, "resampler_head_dim": 96,
                 "qk_layer_norms_perceiver": True}  # fmt: skip
    return IdeficsConfig(
        vocab_size=32000, additional_vocab_size=2, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, cross_layer_interval=4, qk_layer_norms=True, use_resampler=True, vision_config=vision,
        perceiver_config=perceiver,
    )  # fmt: skip


def tiny() -> IdeficsConfig:
    """The same network, small enough for any machine."""
    vision = {"embed_dim": 32, "image_size": 32, "patch_size": 8, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2}  # fmt: skip
    perceiver = {"resampler_n_latents": 8, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
    return IdeficsConfig(
        vocab_size=200, additional_vocab_size=2, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, cross_layer_interval=2, use_resampler=True, vision_config=vision,
        perceiver_config=perceiver,
    )  # fmt: skip


def new_model(config: IdeficsConfig, device: str) -> IdeficsForVisionText2Text:
    """Random weights, made where they stay: 9 billion take a minute to make elsewhere."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return IdeficsForVisionText2Text(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def seconds(run: Callable[[], object], device: str, repeats: int = 5) -> float:
    """The median over repeats, the first left out."""
    times = []
    for _ in range(repeats + 1):
        _settle(device)
        started = time.perf_counter()
        run()
        _settle(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def our_step_s(model: IdeficsForVisionText2Text, rows: int, device: str, *, graphs: bool = False) -> float:
    """One decode step of our decoder, prompts of one image already read."""
    latents = model.config.perceiver_config.resampler_n_latents
    image = torch.randn(latents, model.config.vision_config.embed_dim, device=device, dtype=torch.bfloat16)
    decoder = SlotDecoder(IdeficsDecoder(model, IMAGE_ID), record=CudaGraphs() if graphs else None)
    segment = IdeficsSegment([1, IMAGE_ID, *range(10, 8 + PROMPT_TOKENS)], [image], [1])
    decoder.prefill([PendingPrompt(segment)] * rows)

    def steps() -> None:
        for _ in range(STEPS):
            decoder.step([7] * rows)

    return seconds(steps, device) / STEPS


@torch.inference_mode()
def stock_step_s(model: IdeficsForVisionText2Text, rows: int, device: str) -> float:
    """One step of stock `generate`: the time for STEPS tokens less the time for one, images given as features."""
    latents = model.config.perceiver_config.resampler_n_latents
    inputs = {
        "input_ids": torch.full((rows, PROMPT_TOKENS), 7, device=device),
        "attention_mask": torch.ones(rows, PROMPT_TOKENS, dtype=torch.long, device=device),
        "image_attention_mask": torch.ones(rows, PROMPT_TOKENS, 1, dtype=torch.long, device=device),
        "image_hidden_states": torch.randn(
            rows, 1, latents, model.config.vision_config.embed_dim, device=device, dtype=torch.bfloat16
        ),
    }

    def generate(tokens: int) -> float:
        return seconds(
            lambda: model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens), device, 3
        )

    return (generate(STEPS) - generate(1)) / (STEPS - 1)


@torch.inference_mode()
def images_per_s(model: IdeficsForVisionText2Text, device: str, chunk: int) -> float:
    """Images a second through the vision tower and the resampler."""
    side = model.config.vision_config.image_size
    pixels = torch.randn(chunk, 3, side, side, device=device, dtype=torch.bfloat16)
    encode = lambda: model.model.perceiver_resampler(model.model.vision_model(pixel_values=pixels).last_hidden_state)  # noqa: E731
    return chunk / seconds(encode, device)


def measure(model: IdeficsForVisionText2Text, device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    bandwidth = next((speed for part, speed in BANDWIDTHS.items() if part in name), None)
    vision = sum(p.nbytes for m in (model.model.vision_model, model.model.perceiver_resampler) for p in m.parameters())
    read = sum(p.nbytes for p in model.parameters()) - vision - model.model.embed_tokens.weight.nbytes
    ours = {rows: our_step_s(model, rows, device) for rows in ROWS}
    graphed = {rows: our_step_s(model, rows, device, graphs=True) for rows in ROWS} if device == "cuda" else {}
    stock = {rows: stock_step_s(model, rows, device) for rows in ROWS}
    return {
        "device": name,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "floor_ms": round(1000 * read / bandwidth, 2) if bandwidth else None,
        "step_ms": {rows: round(1000 * value, 2) for rows, value in ours.items()},
        "graphed_step_ms": {rows: round(1000 * value, 2) for rows, value in graphed.items()},
        "stock_step_ms": {rows: round(1000 * value, 2) for rows, value in stock.items()},
        "images_per_s": {chunk: round(images_per_s(model, device, chunk), 1) for chunk in (1, 8, 32)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the script")
    parser.add_argument("--save", help="the name of the file in results/")
    asked = parser.parse_args()
    figures = measure(new_model(tiny() if asked.tiny else idefics_9b(), asked.device), asked.device)
    print(json.dumps(figures, indent=2))
    if asked.save:
        (RESULTS / f"{asked.save}.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

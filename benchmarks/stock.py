"""Stock transformers, as a user would write it: the engine of all contenders except ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, IdeficsProcessor

#: {"prompt": [a text or {"path": a file below the root}, ...], "max_new_tokens": a number}
Request = dict[str, Any]


class Stock:
    """A checkpoint's processor and `generate`, in float32."""

    def __init__(self, checkpoint: str, root: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._root = Path(root)
        self._model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._processor = AutoProcessor.from_pretrained(checkpoint)
        self._processor.tokenizer.padding_side = "left"
        tokens = ["<image>", "<fake_token_around_image>"]
        self._bad_words = self._processor.tokenizer(tokens, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request]) -> list[str]:
        """The new text of each, all in one batch."""
        prompts = [[self._part(part) for part in request["prompt"]] for request in requests]
        inputs = self._inputs(prompts)
        wanted = [request["max_new_tokens"] for request in requests]
        ids = self._model.generate(
            **inputs, do_sample=False, max_new_tokens=max(wanted), bad_words_ids=self._bad_words
        )[:, inputs["input_ids"].shape[1] :]
        rows = [row[:length] for row, length in zip(ids, wanted, strict=True)]
        texts: list[str] = self._processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def _inputs(self, prompts: list[list[str | Image.Image]]) -> Any:
        if isinstance(self._processor, IdeficsProcessor):
            return self._processor(text=prompts, return_tensors="pt", add_end_of_utterance_token=False)
        texts = ["".join(part if isinstance(part, str) else "<image>" for part in prompt) for prompt in prompts]
        images = [[part for part in prompt if not isinstance(part, str)] for prompt in prompts]
        return self._processor(text=texts, images=images, padding=True, return_tensors="pt")

    def _part(self, part: str | dict[str, str]) -> str | Image.Image:
        return part if isinstance(part, str) else Image.open(self._root / part["path"]).convert("RGB")

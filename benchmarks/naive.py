"""What a user would write first: a Celery task that calls `generate` once. `celery -A benchmarks.naive worker`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from celery import Celery
from celery.signals import worker_process_init
from PIL import Image
from transformers import AutoProcessor, IdeficsForVisionText2Text

from worker.models.loading import DEMO

app = Celery("naive", broker=os.environ["IDEFICS_BROKER_URL"], backend=os.environ["IDEFICS_RESULT_BACKEND"])
app.conf.update(
    task_default_queue="naive",
    task_acks_late=True,
    task_track_started=True,
    worker_concurrency=1,
    worker_send_task_events=True,
    result_extended=True,
    broker_transport_options={"priority_steps": list(range(10)), "queue_order_strategy": "priority"},
)

_loaded: dict[str, Any] = {}


@worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
def _load(**_: Any) -> None:
    torch.set_num_threads(int(os.environ["NAIVE_TORCH_THREADS"]))
    _loaded["model"] = IdeficsForVisionText2Text.from_pretrained(DEMO, dtype=torch.float32).eval()
    _loaded["processor"] = AutoProcessor.from_pretrained(DEMO)


@app.task(name="naive.caption")  # type: ignore[untyped-decorator]
@torch.inference_mode()
def caption(path: str, max_new_tokens: int) -> dict[str, str]:
    model, processor = _loaded["model"], _loaded["processor"]
    image = Image.open(Path(os.environ["IDEFICS_IMAGE_ROOT"]) / path).convert("RGB")
    inputs = processor(text=[[image]], return_tensors="pt")
    bad = processor.tokenizer(["<image>", "<fake_token_around_image>"], add_special_tokens=False).input_ids
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, bad_words_ids=bad)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return {"text": processor.tokenizer.decode(new, skip_special_tokens=True)}

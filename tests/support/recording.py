"""A stand-in for CUDA graphs."""

from __future__ import annotations

from worker.engine.cuda_graphs import Step


class StepRecorder:
    """Runs a recorded step at each replay, as a CUDA graph does; counts the recorded ones."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, step: Step) -> Step:
        self.recorded += 1
        return step

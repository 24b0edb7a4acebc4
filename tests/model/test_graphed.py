"""Recorded steps: once for each shape and place, and replayed with new numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.recording import StepRecorder
from worker.engine.cuda_graphs import MAX_GRAPHS, Graphed, bucket


def added(numbers: Tensor, cache: Tensor) -> Tensor:
    """A step: it writes to its cache and answers."""
    cache += numbers[0]
    return cache.sum() + numbers[1]


def test_a_shape_is_recorded_once_and_replayed_with_new_numbers() -> None:
    record, cache = StepRecorder(), torch.zeros(3)
    run = Graphed(added, record)
    assert run(torch.tensor([[1.0] * 3, [0.0] * 3]), [cache]).tolist() == [3, 3, 3]
    assert run(torch.tensor([[2.0] * 3, [1.0] * 3]), [cache]).tolist() == [10, 10, 10]
    assert record.recorded == 1


def test_caches_in_another_place_or_of_another_form_are_recorded_anew() -> None:
    record, whole = StepRecorder(), torch.zeros(4, 4, 1)
    run = Graphed(lambda numbers, cache: cache + numbers, record)
    for cache in (whole[:2, :2], whole[2:, :2], whole[:2], whole[:, :2][::2], whole[:2, :2]):
        run(torch.zeros(2, 1, 1), [cache])
    assert record.recorded == 4


def test_a_block_table_is_an_input_and_not_recorded() -> None:
    record, pool = StepRecorder(), torch.arange(3.0).view(3, 1, 1, 1)
    run = Graphed(lambda numbers, table, pool: pool[table].sum() + numbers, record)
    tables = [[[1, 2]], [[2, 2]], [[0, 1]]]
    assert [run(torch.zeros(1), [torch.tensor(table), pool]).item() for table in tables] == [3, 4, 1]
    assert record.recorded == 1


def test_the_latest_shapes_are_kept() -> None:
    record, caches = StepRecorder(), torch.zeros(MAX_GRAPHS + 1, 1)
    run = Graphed(added, record)
    for cache in (*caches, caches[-1], caches[0]):
        run(torch.zeros(2, 1), [cache])
    assert record.recorded == MAX_GRAPHS + 2


@pytest.mark.parametrize(("rows", "most"), [(1, 1), (2, 2), (3, 4), (33, 64), (64, 64)])
def test_rows_are_rounded_up_to_few_shapes(rows: int, most: int) -> None:
    assert bucket(rows) == most

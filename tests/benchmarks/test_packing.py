"""The packing benchmark refuses to print times of a wrong result."""

import dataclasses

import numpy as np
import pytest

from benchmarks.packing import as_dataset, lengths_of_text, rows_of_dataset, rows_of_plan
from lemur_fast import packing


def test_a_right_plan_passes_and_a_wrong_one_does_not():
    lengths = lengths_of_text(200)
    plan = packing.plan(lengths, 4096)
    rows = rows_of_plan(plan, lengths)
    assert rows.sum() == lengths.sum()
    assert len(rows) == len(plan)
    for field in ("starts", "documents", "lengths"):
        wrong = getattr(plan, field).copy()
        wrong[7] += 1
        with pytest.raises(SystemExit, match="a token is in no row, or in two"):
            rows_of_plan(dataclasses.replace(plan, **{field: wrong}), lengths)


def test_a_dataset_that_lost_tokens_does_not_pass():
    lengths = np.array([5, 1, 9])
    dataset = as_dataset(lengths)
    assert rows_of_dataset(dataset, lengths).tolist() == [5, 1, 9]
    with pytest.raises(SystemExit, match="tokens are lost or doubled"):
        rows_of_dataset(as_dataset(lengths[:2]), lengths)

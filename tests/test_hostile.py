"""One round of tests/hostile.py; ten thousand cases are a maintainer's job: `python tests/hostile.py`."""

from __future__ import annotations

import hostile
import pytest


@pytest.mark.parametrize("number", range(len(hostile.ROUND)), ids=lambda number: f"{hostile.ROUND[number].__name__} {number}")
def test_a_case(number: int) -> None:
    case = hostile.run(0, number)
    assert case["outcome"] != "failed", case["problem"]


def test_a_case_is_its_seed_and_number() -> None:
    draws = [hostile.Draw(seed, number) for seed, number in ((1, 2), (1, 2), (1, 3), (2, 2))]
    first, again, *others = [(draw.random(), draw.normal(3).tolist()) for draw in draws]
    assert first == again
    assert first not in others


def test_a_process_that_dies_is_a_case_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next case runs in a new process."""
    monkeypatch.setattr(hostile.sys, "executable", "false")
    cases = list(hostile.run_all(0, 5, 2))
    assert [case["number"] for case in cases] == [5, 6]
    assert all("the process ends with 1" in case["problem"] for case in cases)

"""The list in mutants.py still fits the source; running it is a maintainer's job: `python tests/mutants.py`."""

from __future__ import annotations

import ast

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.what)
def test_a_mutation_s_text_stands_exactly_once_and_leaves_valid_python(mutant: mutants.Mutant) -> None:
    assert mutants.occurrences(mutant) == 1
    source = (mutants.PACKAGE / mutant.file).read_text(encoding="utf-8")
    assert mutant.old != mutant.new
    ast.parse(source.replace(mutant.old, mutant.new))


def test_descriptions_are_unique() -> None:
    whats = [mutant.what for mutant in mutants.MUTANTS]
    assert len(set(whats)) == len(whats)

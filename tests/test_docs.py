"""Every example of README, pages and docstrings runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import rim_rnn

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("docs/*.md")))]
MODULES = ["rim_rnn", *(f"rim_rnn.{module.name}" for module in pkgutil.iter_modules(rim_rnn.__path__) if module.name[0] != "_")]


def run(tests: list[doctest.DocTest]) -> int:
    """The number of examples that ran; fails with doctest's own report where one prints something else."""
    report: list[str] = []
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    return runner.tries


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_a_page(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^ *```.*$", "", text, flags=re.MULTILINE)  # a fence would count as output
    run([doctest.DocTestParser().get_doctest(text, {}, page, page, 0)])


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings(module: str) -> None:
    run(doctest.DocTestFinder().find(importlib.import_module(module)))


@pytest.mark.parametrize("name", [*rim_rnn.__all__, "recording.Record"])
def test_every_public_name_has_a_page(name: str) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in ROOT.glob("docs/api/*.md"))
    assert re.search(rf"^\.\. auto(class|function):: rim_rnn\.{re.escape(name)}$", pages, flags=re.MULTILINE)


@pytest.mark.parametrize("name", rim_rnn.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    assert run(doctest.DocTestFinder(recurse=False).find(getattr(rim_rnn, name), name)) > 0


def test_the_drawing_of_the_rooms_has_every_module_above_what_it_imports() -> None:
    picture = (ROOT / "docs" / "_static" / "rooms.svg").read_text(encoding="utf-8")
    rooms = {name: int(y) for y, name in re.findall(r'<text class="ink room[^>]* y="(\d+)">(\w+)</text>', picture)}
    sources = {path.stem: path.read_text(encoding="utf-8") for path in Path(rim_rnn.__file__).parent.glob("*.py")}
    assert rooms.keys() == sources.keys()
    for module, source in sources.items():
        for within, names in re.findall(r"^from rim_rnn(?:\.(\w+))? import (.*)$", source, flags=re.MULTILINE):
            assert all(rooms[name] > rooms[module] for name in ([within] if within else names.split(", "))), module

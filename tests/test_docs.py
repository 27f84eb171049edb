"""Every example of README, pages and docstrings runs and prints what it says."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rim_rnn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SITE = "https://rim-rnn.readthedocs.io/en/latest/"
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


def test_code_of_the_readme_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    """Each block alone, with its imports; what it prints stands behind the line."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
        assert capsys.readouterr().out.splitlines() == re.findall(r"^print\(.*\)  # (.+)$", block, flags=re.MULTILINE)


def test_code_of_the_page_on_gpus_runs_or_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "on_a_gpu.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    if torch.cuda.is_available():
        exec(code, {})
        assert capsys.readouterr().out.endswith("by graphs\n")
    else:
        with pytest.raises(SystemExit, match="This needs a GPU"):
            exec(code, {})


@pytest.mark.parametrize("link", sorted(set(re.findall(rf"\]\({SITE}([^)]+)\)", README))))
def test_links_of_the_readme_lead_to_a_page(link: str) -> None:
    """Offline: to what a page is made from, and to the label or the heading in it."""
    page, _, place = link.partition("#")
    name = page.removesuffix(".html")
    places = [ROOT / "docs" / f"{name}.md", ROOT / "examples" / f"{name}.py"]
    (source,) = [ROOT / "examples/gallery/README.rst"] if name == "gallery/index" else filter(Path.exists, places)
    text = source.read_text(encoding="utf-8")
    headings = [
        re.sub(r"[^\w -]", "", found.lower()).replace(" ", "-") for found in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    ]
    assert not place or f"({place})=" in text or place in headings


def test_the_readme_leads_to_no_source_of_a_page() -> None:
    """Its directives show nothing there."""
    assert not re.findall(r"\]\((docs/[^)]+\.md|examples/gallery)", README)


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


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (0, {}),
        (1, {"num_layers": 2}),
        (3, {"num_layers": 2, "bidirectional": True, "rnn_cell": "GRU"}),
        (0, {"num_comm_heads": 0}),
    ],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_function_to_copy_draws_a_record(layer: int, options: dict[str, Any], batch_first: bool) -> None:
    """As it stands in Looking inside: one row of the batch, whatever comes first in the input."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    script = (ROOT / "examples" / "gallery" / "seeing_units.py").read_text(encoding="utf-8")
    (source,) = (ast.get_source_segment(script, node) for node in ast.parse(script).body if getattr(node, "name", "") == "plot")
    names: dict[str, Any] = {"plt": plt}
    exec(source or "", names)
    rnn = rim_rnn.RIM(3, 12, num_units=4, k=2, batch_first=batch_first, **options)
    with rim_rnn.record(rnn) as records, torch.no_grad():
        rnn(torch.randn((5, 7, 3) if batch_first else (7, 5, 3)))
    figure = names["plot"](records[0], row=2, layer=layer)
    active, attention, reads = (torch.tensor(axes.images[0].get_array().tolist()) for axes in figure.axes[:3])
    assert torch.equal(active.T, records[0].active[layer, :, 2].float())
    assert torch.equal(attention.T, records[0].input_attention[layer, :, 2])
    whole = 0.0 if options.get("num_comm_heads") == 0 else 1.0
    assert all(total == pytest.approx(whole, abs=1e-5) for total, any_ in zip(reads.sum(1), active.any(1), strict=True) if any_)
    plt.close(figure)


def test_the_drawing_of_the_rooms_has_every_module_above_what_it_imports() -> None:
    picture = (ROOT / "docs" / "_static" / "rooms.svg").read_text(encoding="utf-8")
    rooms = {name: int(y) for y, name in re.findall(r'<text class="ink room[^>]* y="(\d+)">(\w+)</text>', picture)}
    sources = {path.stem: path.read_text(encoding="utf-8") for path in Path(rim_rnn.__file__).parent.glob("*.py")}
    assert rooms.keys() == sources.keys()
    for module, source in sources.items():
        for within, names in re.findall(r"^from rim_rnn(?:\.(\w+))? import (.*)$", source, flags=re.MULTILINE):
            assert all(rooms[name] > rooms[module] for name in ([within] if within else names.split(", "))), module

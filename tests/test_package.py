"""What is installed: the files, the metadata, the imports, the public names and their signatures."""

import ast
import email
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import OF_THE_REPOSITORY
from torch import nn

import rim_rnn
from rim_rnn import RIM, RIMCell, fast, intact, native, record
from rim_rnn.cell import UnitOptions
from rim_rnn.step import Step

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "rim_rnn"
MODULES = {path.name for path in SOURCES.glob("*.py")}
KERNELS = {f"cusrc/{path.name}" for path in (SOURCES / "cusrc").iterdir()}

# ---------------------------------------------------------------- the distribution


def copy_of_the_project(place: Path) -> Path:
    return shutil.copytree(
        ROOT,
        place / "project",
        ignore=lambda folder, names: [
            name
            for name in names
            if name.startswith((".", "_native", "__pycache__"))
            or name.endswith(".egg-info")
            or name in ("build", "dist", "runs")
        ],
    )


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source distribution of a copy of the project and the wheel made from it, without the native operator."""
    pytest.importorskip("build")
    place = tmp_path_factory.mktemp("package")
    project = copy_of_the_project(place)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place), str(project)]
    done = subprocess.run(command, env=os.environ | {"RIM_RNN_NATIVE": "0"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = place.glob("*.tar.gz"), place.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.mark.slow
def test_wheel_holds_the_modules_and_the_licence(archives: dict[str, Path]) -> None:
    names = zipfile.ZipFile(archives["wheel"]).namelist()
    package = {name for name in names if ".dist-info/" not in name}
    assert package == {f"rim_rnn/{name}" for name in MODULES | KERNELS | {"py.typed"}}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert archives["wheel"].name == f"rim_rnn-{rim_rnn.__version__}-py3-none-any.whl"


@pytest.mark.slow
def test_source_distribution_holds_what_a_build_needs(archives: dict[str, Path]) -> None:
    with tarfile.open(archives["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/rim_rnn/py.typed"} <= names
    assert {f"src/rim_rnn/{name}" for name in MODULES | KERNELS} <= names
    assert {f"src/rim_rnn/csrc/{path.name}" for path in (SOURCES / "csrc").glob("*.*")} <= names
    assert not [name for name in names if name.split("/")[0] in ("examples", "docs")]


@pytest.mark.slow
def test_source_distribution_holds_the_tests_of_the_layer(archives: dict[str, Path]) -> None:
    """For packagers: all but those of the repository itself, whose files are not there."""
    with tarfile.open(archives["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    of_the_repository = {f"tests/test_{name}.py" for name in OF_THE_REPOSITORY}
    kept = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py")} - of_the_repository
    kept |= {f"tests/{name}.py" for name in ("conftest", "drawn", "oracle", "hostile")}
    kept |= {f"tests/fixtures/{path.name}" for path in (ROOT / "tests" / "fixtures").iterdir()}
    assert kept <= names
    assert not of_the_repository & names


def test_metadata(archives: dict[str, Path]) -> None:
    archive = zipfile.ZipFile(archives["wheel"])
    (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(path))
    required = [entry for entry in metadata.get_all("Requires-Dist", []) if "extra ==" not in entry]
    assert sorted(re.split(r"[^\w-]", entry)[0] for entry in required) == ["torch", "typing-extensions"]
    assert metadata.get_all("Provides-Extra") == ["examples", "docs", "test", "release", "nvrtc", "tools"]
    assert metadata["Version"] == rim_rnn.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= {
        url.split(",")[0] for url in metadata.get_all("Project-URL", [])
    }
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_page_on_the_index_links_to_the_repository(archives: dict[str, Path]) -> None:
    """The index has no files of ours: links and pictures lead to where they are at the tag of this version."""
    archive = zipfile.ZipFile(archives["wheel"])
    (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    page = email.message_from_bytes(archive.read(path)).get_payload()
    here, there = (re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", text) for text in ((ROOT / "README.md").read_text(), page))
    assert len(here) == len(there) > 10
    tag = f"v{rim_rnn.__version__}"
    for (picture, target), (_, link) in zip(here, there, strict=True):
        if target.startswith("http"):
            assert link == target
        else:
            assert (ROOT / target).exists(), target
            assert link == f"https://github.com/rim-rnn/rim-rnn/{'raw' if picture else 'blob'}/{tag}/{target}"


def test_one_version_everywhere() -> None:
    """And one date, where there is one: until then README installs from the repository."""
    citation, changes, page = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "CHANGELOG.md", "README.md")
    )
    heading = re.search(r"^## (\S+) \((\S+)\)$", changes, re.MULTILINE)
    assert heading is not None
    version, date = heading.groups()
    assert version == rim_rnn.__version__
    assert f"\nversion: {version}\n" in citation
    assert re.findall("^date-released: (.+)$", citation, re.MULTILINE) == [date] * (date != "unreleased")
    install = page.split("<!-- install -->")[1].split("<!-- install: end -->")[0].splitlines()
    assert ("pip install rim-rnn" in install) == (date != "unreleased")
    from_repository = "pip install --no-build-isolation git+https://github.com/rim-rnn/rim-rnn"
    assert (from_repository in install) == (date == "unreleased")


def test_what_the_project_s_papers_name_is_there() -> None:
    """Targets of the Makefile, and the workflows that badges are about."""
    papers = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md", ".readthedocs.yaml", ".ci/run")]
    papers += [*(ROOT / ".github").rglob("*.*"), *(ROOT / "docs").glob("*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in papers)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:(?:^|^ {4}|`|run: |/cpu )make|target:) (\w+)", text, re.MULTILINE)) <= targets
    workflows = {path.name for path in (ROOT / ".github" / "workflows").iterdir()}
    assert set(re.findall(r"/actions/workflows/([\w.]+)", text)) <= workflows


# ---------------------------------------------------------------- a release


def workflow(name: str) -> dict[Any, Any]:
    yaml = pytest.importorskip("yaml")
    found: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    return found


def test_nothing_is_published_unless_every_check_has_passed() -> None:
    """The job that publishes waits for all jobs of checks.yml, of the same commit; what fails or is skipped stops it."""
    wheels, checks = workflow("wheels.yml"), workflow("checks.yml")
    publish = wheels["jobs"]["publish"]
    (publishes,) = [name for name, job in wheels["jobs"].items() if "gh-action-pypi-publish" in str(job)]
    assert publishes == "publish"
    assert set(publish["needs"]) == set(wheels["jobs"]) - {"publish"}
    (call,) = [job for job in wheels["jobs"].values() if job.get("uses") == "$/.github/workflows/checks.yml"]
    assert call["if"] == publish["if"] == "startsWith(github.ref, 'refs/tags/v')"  # no always(): a red job stops it
    assert call["permissions"] == {"contents": "read"}
    assert "workflow_call" in checks[True]  # YAML takes `on` for it
    assert "github.workflow" not in checks["concurrency"]["group"]  # that is the caller's, which would wait for itself
    assert {step.get("run") for job in checks["jobs"].values() for step in job["steps"]} >= {"make check", "make audit"}
    for job in (*wheels["jobs"].values(), *checks["jobs"].values()):
        assert "continue-on-error" not in str(job)
        assert job is call or job is publish or "if" not in job


@pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("make") is None, reason="no make, or one that runs no such stand-ins"
)
@pytest.mark.parametrize("torch", ["torch==2.13.0+cpu", "torch @ file:///torch.whl", ""])
@pytest.mark.parametrize("verdict", [0, 1])
def test_audit_is_green_only_if_everything_was_looked_at(torch: str, verdict: int, tmp_path: Path) -> None:
    """The versions of the index, so torch's without +cpu; strictly, so that what is not there is an error; torch among them."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    for name, says in {
        "python": f"case \"$*\" in *freeze*) printf '%s\\n' 'numpy==2.4.6' '{torch}' 'torchrl==0.14.0';; esac",
        "pip-audit": f'echo "$@" > asked; cat .cache/audit.txt >> asked; exit {verdict}',
    }.items():
        (scripts / name).write_text(f"#!/bin/sh\n{says}\n")
        (scripts / name).chmod(0o755)
    made = [part for target in ("setup", ".venv/tools", ".venv/release") for part in ("--old-file", target)]
    done = subprocess.run(["make", *made, "audit"], cwd=tmp_path, capture_output=True, text=True, check=False)
    green = verdict == 0 and torch.startswith("torch==")
    assert (done.returncode == 0) == green, done.stdout + done.stderr
    if green:
        options, *audited = (tmp_path / "asked").read_text().splitlines()
        assert "--strict" in options.split()
        assert "--requirement .cache/audit.txt" in options
        assert audited == ["numpy==2.4.6", "torch==2.13.0", "torchrl==0.14.0"]


# ---------------------------------------------------------------- the native operator, or none

BUILD = """
import sys
from setuptools import build_meta

hook, out = sys.argv[1:]
getattr(build_meta, f"prepare_metadata_for_{hook}")(out)
getattr(build_meta, hook)(out)
"""


def build(hook: str, torch: str, environment: dict[str, str], place: Path) -> subprocess.CompletedProcess[str]:
    """A frontend's build of a copy of the project in which a binary of an earlier build lies, into ``out``."""
    project, out = copy_of_the_project(place), place / "out"
    utils = place / "torch" / "utils"  # a torch that has nothing but what the build asks for
    utils.mkdir(parents=True)
    (utils / "__init__.py").touch()
    (utils / "cpp_extension.py").write_text("include_paths = library_paths = list")
    absent = "raise " + environment.get("BROKEN", "ModuleNotFoundError(\"No module named 'torch'\")")
    (utils.parent / "__init__.py").write_text(f"__version__ = {torch!r}" if torch else absent)
    kept = {name: value for name, value in os.environ.items() if name != "RIM_RNN_NATIVE"} | {"PYTHONPATH": str(place)}
    built = project / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    earlier = (project / "src" if hook == "build_editable" else built) / "rim_rnn" / "_native.abi3.so"
    earlier.parent.mkdir(parents=True, exist_ok=True)
    earlier.touch()
    os.utime(earlier, (0, 0))

    command = [sys.executable, "-c", BUILD, hook, str(out)]
    out.mkdir()
    return subprocess.run(command, env=kept | environment, cwd=project, capture_output=True, text=True, check=False)


WITHOUT: list[tuple[str, dict[str, str], str]] = [
    ("2.13.0", {"CC": "/nonexistent", "CXX": "/nonexistent"}, "/nonexistent"),
    ("2.13.0", {"CC": "false", "CXX": "false"}, "false"),
    ("2.9.1+cpu", {}, "it needs torch 2.10 or newer, found 2.9.1+cpu"),
    ("", {}, "No module named 'torch'"),
    ("", {"BROKEN": "OSError('libtorch_cpu.so: cannot open shared object file')"}, "libtorch_cpu.so: cannot open"),
]
"""The version of torch, the environment and the reason that is given."""
hooks = pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])


@pytest.mark.slow
@hooks
@pytest.mark.parametrize(
    ("torch", "environment", "reason"), [("2.13.0", {"RIM_RNN_NATIVE": "0"}, "RIM_RNN_NATIVE=0"), *WITHOUT]
)
def test_installs_without_the_operator(hook: str, torch: str, environment: dict[str, str], reason: str, tmp_path: Path) -> None:
    """One line says so, no binary of an earlier build is left to be taken up, and the wheel is one for any machine."""
    if sys.platform == "win32" and "RIM_RNN_NATIVE" not in environment:
        reason = "the sources need GCC or Clang"
    done = build(hook, torch, environment, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("rim_rnn: ")]
    assert line.startswith("rim_rnn: installing without the native operator, in pure Python: ")
    assert reason in line
    (wheel,) = (tmp_path / "out").glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert not [name for name in names if "_native" in name]
    assert not (tmp_path / "project" / "src" / "rim_rnn" / "_native.abi3.so").exists()
    if hook == "build_wheel":
        assert "rim_rnn/native.py" in names
        assert wheel.name == f"rim_rnn-{rim_rnn.__version__}-py3-none-any.whl"
        described = archive.read(f"rim_rnn-{rim_rnn.__version__}.dist-info/WHEEL").decode()
        assert "Root-Is-Purelib: true" in described
        assert "Tag: py3-none-any" in described


@pytest.mark.slow
@hooks
@pytest.mark.parametrize(("torch", "environment", "reason"), WITHOUT)
def test_an_operator_that_is_asked_for_is_built(
    hook: str, torch: str, environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    """RIM_RNN_NATIVE=1: where it can not be, there is no wheel, and the last line says why."""
    if sys.platform == "win32":
        reason = "the sources need GCC or Clang"
    done = build(hook, torch, environment | {"RIM_RNN_NATIVE": "1"}, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rim_rnn: RIM_RNN_NATIVE=1, but the native operator can not be built: ")
    assert reason in last
    assert not [*(tmp_path / "out").glob("*.whl")]


def reason_in(folder: Path) -> str:
    """Why the package in this folder would not run natively."""
    spec = importlib.util.spec_from_file_location("rim_rnn_elsewhere", shutil.copy(SOURCES / "native.py", folder))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module._unavailable)


def test_a_binary_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, one older than its sources (a checkout that was updated), and one that can not be loaded."""
    monkeypatch.delenv("RIM_RNN_NATIVE", raising=False)
    monkeypatch.setattr(fast, "is_registered", lambda *_: False)  # as in a process that has none yet
    assert (
        reason_in(tmp_path)
        == "the native operator is not installed (the page Installing says where it is, and how to build it)"
    )
    binary, source = tmp_path / "_native.abi3.so", tmp_path / "csrc" / "rim.cpp"
    source.parent.mkdir()
    binary.touch()
    source.touch()
    os.utime(binary, (0, 0))
    assert reason_in(tmp_path) == "the native operator is older than its sources (make setup builds it again)"
    os.utime(source, (0, 0))
    assert reason_in(tmp_path).startswith("the native operator does not load: ")
    monkeypatch.setenv("RIM_RNN_NATIVE", "1")
    with pytest.raises(ImportError, match="RIM_RNN_NATIVE=1, but the native operator does not load"):
        reason_in(tmp_path)


@pytest.mark.skipif(native._unavailable is not None, reason=str(native._unavailable))
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="nm of Linux lists the symbols")
def test_the_binary_needs_nothing_but_the_stable_interface() -> None:
    """Of torch the C functions that stay from version to version, and nothing of Python."""
    (binary,) = SOURCES.glob("_native.*")
    command = ["nm", "--dynamic", "--undefined-only", "--format=just-symbols", str(binary)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    stable = {name for name in symbols if re.match("(aoti_)?torch_", name)}
    assert stable
    assert not [name for name in symbols if re.search("^_?Py|torch|c10|^_ZNK?2at", name) and name not in stable]


# ---------------------------------------------------------------- imports

ALONE = """
import sys

class Nothing:  # but torch, typing-extensions and the standard library
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if path is None and top not in {*sys.stdlib_module_names, *allowed}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

allowed = {"torch", "torchgen", "functorch", "typing_extensions", "rim_rnn"}
allowed |= {"sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec"}  # what torch itself requires
sys.meta_path.insert(0, Nothing())
import torch, typing_extensions
before = set(sys.modules)

def refuse(event, arguments):
    if event.partition(".")[0] in ("socket", "pickle", "subprocess", "urllib"):
        raise RuntimeError(event)

sys.addaudithook(refuse)
import rim_rnn
print(*sorted(set(sys.modules) - before))
print(rim_rnn.__file__)
for rnn in rim_rnn.RIM(4, 12), rim_rnn.RIM(4, 12, rnn_cell="GRU"):
    with rim_rnn.record(rnn) as records:
        rnn(torch.randn(5, 3, 4))[0].sum().backward()
    assert len(records) == 1
print(rnn.path(torch.randn(5, 3, 4)))
"""


@pytest.mark.slow
def test_the_wheel_runs_with_torch_alone(archives: dict[str, Path], tmp_path: Path) -> None:
    """Importing loads no module of anyone else's, nor any part of torch that `import torch` has not loaded.

    Neither it nor a call opens a connection, starts a process or unpickles. This wheel has no operator, and `path` says so.
    """
    zipfile.ZipFile(archives["wheel"]).extractall(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "RIM_RNN_NATIVE": ""}
    command = [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", ALONE]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    new, place, path = done.stdout.splitlines()
    assert path.startswith("readable: the native operator is not installed (the page Installing")
    assert Path(place).parent == tmp_path / "rim_rnn"
    foreign = {name for name in new.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"rim_rnn"} | {f"rim_rnn.{name[:-3]}" for name in MODULES if name[0] != "_"}


def test_sources_import_nothing_else() -> None:
    for path in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                assert node.level == 0, path
            for name in names:
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or top in ("torch", "typing_extensions", "rim_rnn"), (path, name)


def test_imports_run_one_way() -> None:
    """Stages, the definition, operators, cell, layer: each module imports only those before it, and none inside a function."""
    order = [
        "arguments",
        "surroundings",
        "units",
        "recording",
        "input_attention",
        "dynamics",
        "communication",
        "intact",
        "step",
        "operator",
        "readable",
        "fast",
        "native",
        "driver",
        "cuda",
        "cell",
        "layout",
        "layer",
    ]
    assert {f"{name}.py" for name in order} | {"__init__.py", "__main__.py"} == MODULES
    for place, module in enumerate([*order, "__init__", "__main__"]):
        tree = ast.parse((SOURCES / f"{module}.py").read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert all(node in tree.body for node in imports), module
        names = [node.module or "" for node in imports if isinstance(node, ast.ImportFrom)]
        names += [f"rim_rnn.{a.name}" for node in imports if getattr(node, "module", "") == "rim_rnn" for a in node.names]
        ours = {name.partition(".")[2] for name in names if name.startswith("rim_rnn.")}
        assert ours <= set(order[:place]), module
        if module == "step":
            assert ours <= set(order[2:8])
        if module in ("arguments", "surroundings", "units", "recording"):
            assert not ours, module


def test_what_stands_below_the_definition_knows_its_methods() -> None:
    """By name, for it can not import the class."""
    assert {name for name, value in vars(Step).items() if callable(value)} - {"__init__"} == intact.STEP


SECOND = """
import importlib, importlib.metadata, shutil, sys, torch

def not_there(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.version = importlib.metadata.distribution = not_there
import rim_rnn

def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "rim_rnn"]:
        del sys.modules[name]

def train(rnn):
    rnn(torch.randn(5, 3, 4))[0].sum().backward()
    return rnn.path(torch.randn(5, 3, 4))

first = rim_rnn.RIM(4, 12)
train(first)
forget()
import rim_rnn as again
assert again is not rim_rnn
second = again.RIM(4, 12)
shutil.copytree(rim_rnn.__path__[0], "copy/rim_rnn", copy_function=shutil.copy2)
sys.path.insert(0, "copy")
forget()
import rim_rnn as copy
assert copy.__path__ != rim_rnn.__path__
print(*{train(rnn) for rnn in (first, second, copy.RIM(4, 12))}, sep="\\n")
forget()
with open("copy/rim_rnn/readable.py", "a") as file:
    file.write("SCHEMA += ', int more'\\n_register()\\n")
import rim_rnn
"""


@pytest.mark.slow
def test_a_second_import_and_a_copy_in_one_process(tmp_path: Path) -> None:
    """Without metadata too. A copy with other operators is an ImportError."""
    environment = os.environ | {"PYTHONPATH": str(SOURCES.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SECOND]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == [RIM(4, 12).path(torch.randn(5, 3, 4))], done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: another version of rim_rnn has registered its operators in this process"


# ---------------------------------------------------------------- public names and signatures


def test_public_names() -> None:
    modules = {name[:-3] for name in MODULES}
    assert rim_rnn.__all__ == ["RIM", "RIMCell", "record"]
    assert {name for name in vars(rim_rnn) if not name.startswith("_")} - modules == {"RIM", "RIMCell", "record"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", rim_rnn.__version__)


OPTIONS = {
    "num_units": None,
    "k": None,
    "rnn_cell": "LSTM",
    "key_size_input": None,
    "value_size_input": None,
    "query_size_input": None,
    "num_input_heads": 1,
    "input_dropout": 0.0,
    "key_size_comm": None,
    "value_size_comm": None,
    "query_size_comm": None,
    "num_comm_heads": 4,
    "comm_dropout": 0.0,
    "comm_bounded": True,
}


def parameters(function: Any, kind: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind is kind]


POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def test_signature_of_the_layer() -> None:
    """The positional part is nn.LSTM's, which hands everything after its mode to RNNBase."""
    torchs = [p for p in parameters(nn.RNNBase.__init__, POSITIONAL) if p[0] != "mode"]
    assert parameters(RIM.__init__, POSITIONAL) == torchs
    assert dict(parameters(RIM.__init__, KEYWORD)) == OPTIONS


def test_signature_of_the_cell() -> None:
    assert parameters(RIMCell.__init__, POSITIONAL) == parameters(nn.LSTMCell.__init__, POSITIONAL)
    assert dict(parameters(RIMCell.__init__, KEYWORD)) == {"proj_size": 0} | OPTIONS


def test_signatures_of_forward() -> None:
    assert parameters(RIM.forward, POSITIONAL) == parameters(nn.LSTM.forward, POSITIONAL)
    assert parameters(RIMCell.forward, POSITIONAL) == parameters(nn.LSTMCell.forward, POSITIONAL)


def test_overloads_know_every_keyword() -> None:
    assert {*UnitOptions.__annotations__, "rnn_cell"} == set(OPTIONS)


@pytest.mark.parametrize("public", [RIM, RIMCell])
def test_docstrings_list_the_arguments_in_order(public: type[nn.Module]) -> None:
    text = inspect.getdoc(public) or ""
    section = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    listed = re.findall(r"^ {4}(\w+):", section, flags=re.MULTILINE)
    assert listed == list(inspect.signature(public).parameters)


@pytest.mark.parametrize("public", [RIM, RIMCell, record])
def test_docstrings_have_their_parts(public: Any) -> None:
    text = inspect.getdoc(public) or ""
    assert "Args:" in text
    assert "Raises:" in text
    assert ">>> " in text
    assert "Goyal et al., 2021" in text

"""The optional native operator. Everything else about the package stands in pyproject.toml.

It is built where a C++17 compiler of the GCC family and torch are at hand (`pip install --no-build-isolation .`); the binary
serves every Python from 3.10 and every torch from 2.10. Where it can not be built, the package installs without it, from a pure
wheel; with RIM_RNN_NATIVE=1 that is an error.
"""

import os
import re
import sys
import textwrap
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
CSRC = "src/rim_rnn/csrc"
WHERE = [('^Homepage = "(.+)"', "pyproject.toml"), ('^__version__ = "(.+)"', "src/rim_rnn/__init__.py")]


def native() -> Extension | str:
    """The operator, or why it can not be built."""
    if os.environ.get("RIM_RNN_NATIVE") == "0":
        return "RIM_RNN_NATIVE=0"
    if sys.platform == "win32":
        return "the sources need GCC or Clang"
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:  # a broken torch raises what it likes
        return f"{error} (pip install --no-build-isolation builds it against the installed torch)"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"it needs torch 2.10 or newer, found {torch.__version__}"
    return Extension(
        "rim_rnn._native",
        sources=[f"{CSRC}/{name}.cpp" for name in ("rim", "baseline", "avx2", "avx512")],
        depends=[f"{CSRC}/{path.name}" for path in sorted((HERE / CSRC).glob("*.h"))],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030a0000")],
        extra_compile_args=[
            *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"),
            *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        ],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        language="c++",
        py_limited_api=True,
    )


def go_without(command: Command, reason: object) -> None:
    """Say so in one line, tag the wheel as pure, and leave no binary of an earlier build where this one would take it up."""
    short = textwrap.shorten(str(reason), 160)
    if os.environ.get("RIM_RNN_NATIVE") == "1":
        sys.exit(f"rim_rnn: RIM_RNN_NATIVE=1, but the native operator can not be built: {short}")
    for folder in (command.build_lib, "src") if command.editable_mode else (command.build_lib,):
        for binary in Path(folder, "rim_rnn").glob("_native.*"):
            binary.unlink()
    wheel = command.distribution.get_command_obj("bdist_wheel", create=False)
    if wheel is not None:  # it was told of an operator, when it began
        wheel.root_is_pure, wheel.py_limited_api = True, False
    print(f"rim_rnn: installing without the native operator, in pure Python: {short}", file=sys.stderr)


def readme() -> str:
    """README.md for the index: what it links to in the repository is linked to there, as it was at this version's tag."""
    here, version = (re.search(pattern, (HERE / name).read_text(encoding="utf-8"), re.MULTILINE)[1] for pattern, name in WHERE)
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{here}/raw/v{version}/", text)
    return re.sub(r"(\]\()(?!https?:)", rf"\1{here}/blob/v{version}/", text)


class BuildPython(build_py):
    """setup.py runs for the metadata too; this command runs once."""

    def run(self) -> None:
        if isinstance(operator, str):
            go_without(self, operator)
        super().run()


class BuildOrGoWithout(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.extensions.remove(ext)
            go_without(self, error)


operator = native()
built = isinstance(operator, Extension)
setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=[operator] if built else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildOrGoWithout},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if built else {},
)

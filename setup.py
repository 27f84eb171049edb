"""The optional native operator. Everything else about the package stands in pyproject.toml.

It is built where a C++17 compiler of the GCC family and torch are at hand (`pip install --no-build-isolation .`); the binary
serves every Python from 3.10 and every torch from 2.10. Where it can not be built, the package installs without it.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
CSRC = "src/rim_rnn/csrc"


def without(reason: object) -> None:
    print(f"rim_rnn: installing without the native operator, in pure Python: {reason}", file=sys.stderr)


def native() -> list[Extension]:
    if os.environ.get("RIM_RNN_NATIVE") == "0":
        without("RIM_RNN_NATIVE=0")
        return []
    if sys.platform == "win32":
        without("the sources need GCC or Clang")
        return []
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        without(f"{error} (pip install --no-build-isolation builds it against the installed torch)")
        return []
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        without(f"it needs torch 2.10 or newer, found {torch.__version__}")
        return []
    return [
        Extension(
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
    ]


class BuildOrGoWithout(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            without(error)
            self.extensions.remove(ext)


extensions = native()
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildOrGoWithout},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
    exclude_package_data={"rim_rnn": ["csrc/*"]},
)

"""What an unpacked wheel is made of and needs, in its dist-info: a CycloneDX document (PEP 770) and its licences (PEP 639).

python .ci/sbom.py FOLDER
"""

import email
import os
import re
import subprocess
import sys
import uuid
from datetime import datetime, timezone
from importlib.metadata import files, metadata, version
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement

LLVM = "Apache-2.0 WITH LLVM-exception"
TEXTS = {
    "torch": "torch-*.dist-info/licenses/LICENSE",
    "zig": "ziglang-*.dist-info/licenses/ziglang/LICENSE",
    "libcxx": "ziglang-*.dist-info/licenses/ziglang/lib/libcxx/LICENSE.TXT",
}


def component(name: str, licence: str, what: str = "", version: str | None = None, pypi: bool = False) -> Component:
    return Component(
        name=name,
        version=version,
        description=what or None,
        type=ComponentType.LIBRARY,
        licenses=[LicenseFactory().make_from_string(licence)],
        purl=PackageURL("pypi", name=name, version=version) if pypi else None,
        bom_ref=f"{name} {what}".strip(),
    )


def licence(package: str) -> str:
    found = metadata(package)
    return found.get("License-Expression") or found["License"]


def license_texts(info: Path) -> None:
    """What the operator has compiled in and linked in comes with its licences' texts."""
    described = (info / "METADATA").read_text()
    for name, pattern in TEXTS.items():
        (text,) = [file for file in files(pattern.partition("-")[0]) if file.match(pattern)]
        copy = info / "licenses" / name / text.name
        copy.parent.mkdir()
        copy.write_bytes(text.locate().read_bytes())
        described = described.replace("License-File: LICENSE\n", f"License-File: LICENSE\nLicense-File: {name}/{text.name}\n")
    (info / "METADATA").write_text(described)


def main(folder: Path) -> None:
    (info,) = folder.glob("*.dist-info")
    own = email.message_from_string((info / "METADATA").read_text())
    required = [Requirement(entry) for entry in own.get_all("Requires-Dist", []) if "extra ==" not in entry]
    parts = [component(r.name, licence(r.name), f"required at run time: {r}", pypi=True) for r in required]
    if list(folder.glob("rim_rnn/_native.*")):
        license_texts(info)
        clang = subprocess.check_output([sys.executable, "-m", "ziglang", "c++", "--version"], text=True)
        llvm = re.search(r"clang version (\S+)", clang)[1]
        parts += [component(name, LLVM, "linked in", llvm) for name in ("libc++", "libc++abi", "libunwind")]
        parts += [component("compiler_rt", licence("ziglang"), "linked in, of zig", version("ziglang"))]
        parts += [component("torch", licence("torch"), "headers compiled in", version("torch").partition("+")[0], pypi=True)]
    bom = Bom(components=parts)
    bom.metadata.component = component("rim-rnn", own["License-Expression"], version=own["Version"], pypi=True)
    bom.metadata.timestamp = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), timezone.utc)
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, f"{folder.name} {(info / 'WHEEL').read_text()}")
    bom.register_dependency(bom.metadata.component, parts)
    (info / "sboms").mkdir()
    (info / "sboms" / "rim-rnn.cdx.json").write_text(JsonV1Dot6(bom).output_as_string(indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

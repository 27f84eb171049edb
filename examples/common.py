"""What the examples share: the processor's name, and tables that a program writes into pages, each between two marks."""

import platform
from pathlib import Path


def cpu() -> str:
    """The processor's name, and on x86 the numbers that tell its generation where the name does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        numbers = [f"{word} {about[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in about]
        return " ".join([about["model name"], *[f"({', '.join(numbers)})"] * bool(numbers)])
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def marks(name: str, writer: str) -> tuple[str, str]:
    """The lines before and after a table."""
    return f"<!-- {name}: written by {writer} -->", f"<!-- {name}: end -->"


def put(page: str, tables: dict[str, str], writer: str) -> str:
    """`page` with each table that it has marks for between them; it has to have some."""
    found = False
    for name, table in tables.items():
        begin, end = marks(name, writer)
        if begin not in page and end not in page:
            continue
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"expected one line {begin} and after it one line {end}")
        before, rest = page.split(begin)
        page, found = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}", True
    if not found:
        raise ValueError(f"expected one line {' or '.join(marks(name, writer)[0] for name in tables)}")
    return page

"""The code blocks and commands of the README and of ``docs/``, for the tests that run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block. A ``console`` block is a command after ``$``, and the ``output`` that it prints."""

    page: str
    line: int
    language: str
    text: str
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    """All fenced blocks, in order. Every block names its language."""
    found: list[Block] = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```\n", text, re.M | re.S):
            language, body = match.groups()
            line = text.count("\n", 0, match.start()) + 1
            assert language, f"{name}:{line}: a code block without a language"
            output = None
            if language == "console":
                first, _, output = body.partition("\n")
                assert first.startswith("$ "), f"{name}:{line}: {first}"
                body = first[2:]
            found.append(Block(name, line, language, body, output))
    return found


def commands() -> list[tuple[str, str]]:
    """``(where, command)`` of each line of a ``sh`` block, of a ``console`` block, and of each command in running text.

    A command in running text is a code span that begins with ``anabranch``, ``python`` or ``make``, unless it has a
    word in capitals, which stands for something else.
    """
    found = []
    for block in blocks():
        if block.language in ("sh", "console"):
            lines = block.text.replace("\\\n", " ").splitlines()
            found += [(str(block), line.strip()) for line in lines if line.strip()]
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for span in re.findall(r"`([^`]+)`", text):
            words = " ".join(span.split())
            if re.match(r"(anabranch|python|make) [-\w]", words) and not re.search(r"(^| )[A-Z_]{2,}( |$)", words):
                found.append((str(page.relative_to(ROOT)), words))
    return list(dict.fromkeys(found))


def needs_streams(block: Block) -> bool:
    """Whether a Python block needs CUDA or the simulated device."""
    return re.search(r"cuda|sim\b", block.text) is not None

"""The pages of the documentation, and the blocks and commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
SHELL = "bash"
# A command within a sentence, and not only its name.
BEGINNINGS = ("accelerate launch ", "python ", "scripts/", "make ", "moa-diffusion ")
WHOLE = r"scripts/\w+\.py \S|make |moa-diffusion [a-z-]+ [a-z-]"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    number: int
    language: str
    text: str
    mark: str  # what the comment above it says; empty if there is none

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


BLOCKS = [
    Block(page, number, found["language"], found["text"], found["mark"] or "")
    for page, text in PAGES.items()
    for number, found in enumerate(FENCE.finditer(text))
]


def blocks(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def files(page: str) -> dict[str, str]:
    """The blocks of a page that stand for files, by name."""
    marked = [block for block in BLOCKS if block.page == page and block.mark.startswith("file: ")]
    return {block.mark.removeprefix("file: "): block.text for block in marked}


def commands() -> list[tuple[str, str]]:
    """All commands, of blocks and within sentences, each with its page."""
    found = []
    for block in blocks(SHELL):
        lines = block.text.replace("\\\n", " ").splitlines()
        found += [(block.page, " ".join(line.split())) for line in lines if line.strip()]
    for page, text in PAGES.items():
        for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
            begins = code.startswith(BEGINNINGS)
            if (begins and re.search(WHOLE, code)) or "pip install" in code:
                found.append((page, code))
    return list(dict.fromkeys(found))

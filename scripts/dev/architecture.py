"""Writes the tree of every module into docs/architecture.md, each with what its docstring says.

``python scripts/dev/architecture.py``, from anywhere.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("moa_diffusion", "rewards")
BEGIN, END = "<!-- tree: begin -->", "<!-- tree: end -->"


def summary(path: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def tree() -> str:
    """Return a Markdown list of the packages: rooms, and the modules in them."""
    lines: list[str] = []

    def visit(folder: Path) -> None:
        depth = "  " * (len(folder.relative_to(ROOT).parts) - 1)
        lines.append(f"{depth}- **{folder.name}/** {summary(folder / '__init__.py')}")
        modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        lines.extend(f"{depth}  - `{path.name}` {summary(path)}" for path in modules)
        for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
            visit(inner)

    for package in PACKAGES:
        visit(ROOT / package)
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with the tree as the code is now.

    Args:
        text: The page; its tree stands between two comments.
    """
    block = f"{BEGIN}\n\n{tree()}\n\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: block, text, flags=re.DOTALL)


def main() -> int:
    """Write the page if it is not up to date."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

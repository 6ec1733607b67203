"""Prints sizes that tell how well one finds one's way in the code.

``python scripts/dev/house.py [ROOT]``: with the root of another checkout, the numbers of that one.
"""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

PACKAGES = ("moa_diffusion", "rewards")


def modules(root: Path) -> dict[str, Path]:
    """Return the files of both packages by their dotted names."""
    paths = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of the packages that a module imports, also inside functions."""
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: -node.level + (path.name == "__init__.py") or None]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                targets.add(full if full in known else base)
    return targets & known.keys()


def room(name: str, known: dict[str, Path]) -> str:
    """Return the folder that a module lies in; a module of the root is a room of its own."""
    parts = name.split(".")
    if len(parts) == 1 or (known[name].name == "__init__.py" and len(parts) == 2):
        return name
    return ".".join(parts[:2])


def arrows(known: dict[str, Path], package: str = "") -> tuple[int, int]:
    """Return how many rooms there are, and how many pairs of rooms an import joins.

    Args:
        known: All modules by their dotted names, with their files.
        package: The package whose rooms count; by default those of both.
    """
    pairs = set()
    for name, path in known.items():
        for other in imported(name, path, known):
            ends = room(name, known), room(other, known)
            inside = all(end.startswith(package) for end in ends)
            if ends[0] != ends[1] and inside:
                pairs.add(ends)
    rooms = {room(name, known) for name in known if name.startswith(package)}
    return len(rooms), len(pairs)


def report(root: Path) -> dict[str, object]:
    """Return the numbers by what they count."""
    known = modules(root)
    texts = {name: path.read_text(encoding="utf-8") for name, path in known.items()}
    folders = Counter(
        str(path.parent.relative_to(root)) for path in known.values() if path.name != "__init__.py"
    )
    functions: list[tuple[int, str]] = []
    constructors: list[tuple[int, str]] = []
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                functions.append((node.end_lineno - node.lineno + 1, f"{name}:{node.name}"))
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                        arguments = inner.args.args[1:] + inner.args.kwonlyargs
                        constructors.append((len(arguments), f"{name}:{node.name}"))
    lines = sum(len(text.splitlines()) for text in texts.values())
    words = sum(len(re.findall(r"\bfound\b", text)) for text in texts.values())
    docs = root / "docs"
    return {
        "modules per folder (above 10)": {
            folder: count for folder, count in folders.most_common() if count > 10
        },
        "modules in the root of moa_diffusion": folders["moa_diffusion"],
        "rooms, arrows: both packages": arrows(known),
        "rooms, arrows: inside rewards": arrows(known, "rewards"),
        "lines of the packages": lines,
        "longest functions (lines)": sorted(functions, reverse=True)[:3],
        "longest constructors (parameters)": sorted(constructors, reverse=True)[:4],
        "`found` per 1,000 lines": round(1000 * words / lines, 1),
        "Args lines that begin with `of`": sum(
            len(re.findall(r"(?im)^ +\w+: of\b", text)) for text in texts.values()
        ),
        "README (kB)": round((root / "README.md").stat().st_size / 1000, 1),
        "pages in docs": len(list(docs.glob("*.md"))) if docs.is_dir() else 0,
    }


def main() -> int:
    """Print the numbers of this checkout, or of another."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2]
    for name, value in report(root).items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The package is built in floors: each folder imports from its own floor and from those below it, and nothing else.

Sources are parsed, not imported: no PyTorch and no compiler is needed. An import counts wherever it stands: at the top
of a file, in a function, under ``TYPE_CHECKING``, relative, or as a string that names a module of the package
(``import_module("anabranch.sim")``). Who imports a module of another folder imports that folder's ``__init__``, too.
What is not seen is a name that is put together at run time; the package has none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src/anabranch"

#: From the ground up. Each is a folder or a file of the package.
FLOORS = (
    "errors",
    "_version",
    "_sync",  # what threads share; the explorer's objects get in here
    "_activity",  # what a thread is doing; runtimes say it, the explorer asks
    "_trust",
    "_toolchain",
    "_extension",
    "_judge",
    "_exit",
    "models",
    # A model becomes a plan that is proved free of races. None of them knows a device.
    "export",
    "plan",
    "race",
    # Below the backends and the runtime, which both use streams. `sim` registers its device here.
    "devices",
    "backends",
    "runtime",
    # Runs programs, with or without engines and a device. Knows the runtime by what it declares in `_sync` and
    # `_activity`; `sim` registers its machine here.
    "explore",
    # A device for `devices` and a machine for `explore`.
    "sim",
    # Tools. `ahead` takes models as `check` does.
    "check",
    "ahead",
    "dynamo",  # torch.compile's way in
    "_entry_point",
    "anabranch",  # the package's face: what users import
    # Uses the face, as the other systems that it measures are used.
    "bench",
    "generation",  # modules for users to compile; knows errors only
    "include",
    "cpp",
    "cli",
    "__main__",
)

#: Files that may import each other. Three are a knot that nobody unties any more.
LARGEST_CIRCLE = 2


class Import(NamedTuple):
    """``file`` imports ``target`` in ``line``; both paths are relative to the package."""

    file: Path
    line: int
    target: Path


def imports(package: Path) -> list[Import]:
    """Every import of one file of ``package`` by another."""
    modules = {_name(package, path): path for path in package.rglob("*.py")}
    found = set()
    for name, path in modules.items():
        for line, target in _named(path, name, modules):
            parts = target.split(".")
            above = [".".join(parts[:n]) for n in range(1, len(parts))]
            # The folders that the importing file is in are being imported already.
            for each in (target, *(folder for folder in above if not f"{name}.".startswith(f"{folder}."))):
                if each != name:
                    found.add(Import(path.relative_to(package), line, modules[each].relative_to(package)))
    return sorted(found)


def _name(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _named(path: Path, name: str, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and module of each import in the file, as it is written."""
    root = name.partition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*inside[: len(inside) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}"
                if target in modules or base in modules:
                    yield node.lineno, target if target in modules else base
        elif isinstance(node, ast.Constant) and node.value in modules and node.value != root:
            yield node.lineno, str(node.value)


def floor_of(package: Path, path: Path) -> str:
    """The folder or file right below the package; the package itself for its ``__init__``."""
    first = path.parts[0]
    return package.name if first == "__init__.py" else first.removesuffix(".py")


def upward(package: Path, floors: Sequence[str], found: Sequence[Import]) -> list[str]:
    """A line for each import of a higher floor, and for each file without a floor: where, and what to do."""
    wrong = []
    for path in sorted({p for i in found for p in (i.file, i.target)}):
        if floor_of(package, path) not in floors:
            wrong.append(f"{package.name}/{path}: has no floor; put {floor_of(package, path)!r} into FLOORS")
    for file, line, target in found:
        ours, theirs = floor_of(package, file), floor_of(package, target)
        if ours in floors and theirs in floors and floors.index(ours) < floors.index(theirs):
            wrong.append(
                f"{package.name}/{file}:{line}: {ours!r} imports {package.name}/{target}, and {theirs!r} is a higher"
                f" floor. Move what both need to a floor below {ours!r}; or let {theirs!r} register with {ours!r}, as"
                " anabranch.sim does with anabranch.devices.register."
            )
    return wrong


def circles(package: Path, found: Sequence[Import], largest: int) -> list[str]:
    """A text for each set of more than ``largest`` files that all import each other, directly or by others."""
    edges: dict[Path, set[Path]] = {}
    for file, _, target in found:
        edges.setdefault(file, set()).add(target)

    def reached(start: Path) -> set[Path]:
        seen: set[Path] = set()
        ahead = [start]
        while ahead:
            for target in edges.get(ahead.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    ahead.append(target)
        return seen

    reach = {file: reached(file) for file in edges}
    knots = {frozenset(g for g in reach[f] if f in reach.get(g, ())) for f in edges}
    wrong = []
    for knot in sorted(map(sorted, knots)):
        if len(knot) > largest:
            lines = [
                f"{package.name}/{i.file}:{i.line} imports {i.target}" for i in found if {i.file, i.target} <= {*knot}
            ]
            wrong.append(
                f"{len(knot)} files import each other; take one of these imports away:\n  " + "\n  ".join(lines)
            )
    return wrong


def includes(package: Path) -> list[Import]:
    """Every C++ file of the package that another includes by its path."""
    found = []
    for path in sorted((*package.rglob("*.cpp"), *package.rglob("*.h"))):
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = re.match(r'\s*#\s*include\s+"([^"]+)"', text)
            for folder in (path.parent, package / "include") if match else ():
                target = (folder / match[1]).resolve() if match else path
                if target.is_relative_to(package) and target.exists():
                    found.append(Import(path.relative_to(package), number, target.relative_to(package)))
                    break
    return found


def test_no_file_imports_from_a_higher_floor() -> None:
    found = imports(PACKAGE)
    assert len(found) > 300
    assert not (wrong := upward(PACKAGE, FLOORS, found)), "\n".join(wrong)


def test_no_header_is_included_from_a_higher_floor() -> None:
    found = includes(PACKAGE)
    assert len(found) > 30
    assert any(floor_of(PACKAGE, i.file) != floor_of(PACKAGE, i.target) for i in found)
    assert not (wrong := upward(PACKAGE, FLOORS, found)), "\n".join(wrong)


def test_no_more_than_two_files_import_each_other() -> None:
    assert not (wrong := circles(PACKAGE, imports(PACKAGE), LARGEST_CIRCLE)), "\n".join(wrong)


def test_every_floor_is_there() -> None:
    for floor in FLOORS:
        assert floor == "anabranch" or (PACKAGE / floor).is_dir() or (PACKAGE / f"{floor}.py").exists(), floor
    assert len({*FLOORS}) == len(FLOORS)


# -- the checks themselves, on a small package with floors `low` and `high` -----------------------------------------


@pytest.fixture
def house(tmp_path: Path) -> Path:
    for name, text in {
        "__init__": "",
        "ground": "",
        "low/__init__": "",
        "low/a": "import house.ground\n",
        "low/b": "from house.low import a\n",
        "high/__init__": "from house.high.c import C\n",
        "high/c": "from house import ground\nfrom house.low.a import x\nC = 1\n",
    }.items():
        path = tmp_path / "house" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "house"


HOUSE = ("ground", "low", "high", "house")


def test_a_house_in_order_is_found_to_be_so(house: Path) -> None:
    found = imports(house)
    assert {(str(i.file), i.line, str(i.target)) for i in found} == {
        ("low/a.py", 1, "ground.py"),
        ("low/b.py", 1, "low/a.py"),
        ("high/__init__.py", 1, "high/c.py"),
        ("high/c.py", 1, "ground.py"),
        ("high/c.py", 2, "low/a.py"),
        ("high/c.py", 2, "low/__init__.py"),
    }
    assert upward(house, HOUSE, found) == []
    assert circles(house, found, 1) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import house.high.c",
        "import house.high.c as c, os",
        "from house.high import c",
        "from house import high",
        "from ..high.c import C",
        "from .. import high",
        "def late():\n    from house.high import C",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.high import C",
        "import importlib\nhigh = importlib.import_module('house.high')",
        "import house",
        "from house import compile",
    ],
)
def test_a_planted_import_of_a_higher_floor_is_found(planted: str, house: Path) -> None:
    (house / "low/a.py").write_text(planted + "\n", encoding="utf-8")
    wrong = upward(house, HOUSE, imports(house))
    assert wrong
    line = planted.count("\n") + 1
    above = "'house'" if planted in ("import house", "from house import compile") else "'high'"
    for text in wrong:
        assert text.startswith(f"house/low/a.py:{line}: 'low' imports house/")
        assert f"{above} is a higher floor" in text
        assert "register" in text


def test_a_folder_without_a_floor_is_found(house: Path) -> None:
    (house / "shed.py").write_text("import house.ground\n", encoding="utf-8")
    (wrong,) = upward(house, HOUSE, imports(house))
    assert wrong == "house/shed.py: has no floor; put 'shed' into FLOORS"


@pytest.mark.parametrize("where", ["top", "function"])
def test_a_planted_circle_is_found(where: str, house: Path) -> None:
    late = "def late():\n    " if where == "function" else ""
    (house / "low/a.py").write_text(f"{late}from house.low import b\n", encoding="utf-8")
    assert circles(house, imports(house), 2) == []
    (two,) = circles(house, imports(house), 1)
    assert "2 files import each other" in two
    (house / "low/b.py").write_text(f"{late}from house.low import d\n", encoding="utf-8")
    (house / "low/d.py").write_text("from house.low.a import x\n", encoding="utf-8")
    (three,) = circles(house, imports(house), 2)
    line = 2 if late else 1
    assert three.splitlines() == [
        "3 files import each other; take one of these imports away:",
        f"  house/low/a.py:{line} imports low/b.py",
        f"  house/low/b.py:{line} imports low/d.py",
        "  house/low/d.py:1 imports low/a.py",
    ]


def test_two_circles_with_a_file_in_common_are_one(house: Path) -> None:
    (house / "low/a.py").write_text("from house.low import b, d\n", encoding="utf-8")
    (house / "low/d.py").write_text("from house.low import a\n", encoding="utf-8")
    (knot,) = circles(house, imports(house), 2)
    assert "3 files import each other" in knot


def test_a_circle_through_a_folders_init_is_found(house: Path) -> None:
    (house / "ground.py").write_text("from house.high import c\n", encoding="utf-8")
    (knot,) = circles(house, imports(house), 2)
    assert "house/ground.py:1 imports high/__init__.py" in knot


def test_a_planted_include_from_a_higher_floor_is_found(house: Path) -> None:
    (house / "high/seam.h").write_text("#pragma once\n", encoding="utf-8")
    (house / "low/user.cpp").write_text('#include <vector>\n  #include "../high/seam.h"\n', encoding="utf-8")
    (wrong,) = upward(house, HOUSE, includes(house))
    assert wrong.startswith("house/low/user.cpp:2: 'low' imports house/high/seam.h")

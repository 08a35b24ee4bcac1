"""The docs are true: paths and links exist, code runs, commands parse, and tables hold what the results hold.

What needs a device with streams runs in ``tests/sim/test_docs_on_sim.py``.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import documents
from documents import ROOT, Block

LAYOUT = (ROOT / "docs/layout.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = documents.blocks()
COMMANDS = documents.commands()


# -- pages --------------------------------------------------------------------------------------------------------


def test_every_path_named_in_the_layout_exists() -> None:
    paths = {p for p in re.findall(r"`([\w./-]+)`", LAYOUT) if "/" in p}
    assert len(paths) > 40
    missing = sorted(p for p in paths if not (ROOT / p).exists())
    assert not missing


def test_every_folder_of_the_package_is_in_the_layout() -> None:
    folders = [p for p in (ROOT / "src/anabranch").iterdir() if p.is_dir() and (p / "__init__.py").exists()]
    assert len(folders) >= 7
    for folder in folders:
        assert f"src/anabranch/{folder.name}/" in LAYOUT


def test_relative_links_resolve() -> None:
    for page in documents.PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([\w-]+))?\)", page.read_text(encoding="utf-8")):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
                anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in anchors, f"{page.name}: {target}#{anchor}"


def test_every_page_is_linked_from_the_readme() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README, page.name


def test_the_readme_is_short_and_has_one_small_table() -> None:
    assert README.count("\n") <= 125
    tables = re.findall(r"(?:^\|.*\n)+", README, re.M)
    assert len(tables) == 1
    assert tables[0].count("\n") <= 2 + 9


def test_the_glossary_is_in_order_and_has_at_most_thirty_words() -> None:
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| (.+?) \|", text, re.M)[1:]
    assert 20 <= len(words) <= 30
    assert words == sorted(words, key=str.lower)


def test_tables_are_those_of_the_committed_results() -> None:
    pages = _load(ROOT / "benchmarks/tables.py").changed()
    assert not pages, f"{[p.name for p in pages]}: run python benchmarks/tables.py"


# -- code ---------------------------------------------------------------------------------------------------------


def _python_pages() -> dict[str, list[Block]]:
    """Pages whose Python needs no device with streams."""
    pages: dict[str, list[Block]] = {}
    for block in BLOCKS:
        if block.language == "python":
            pages.setdefault(block.page, []).append(block)
    return {page: found for page, found in pages.items() if not any(documents.needs_streams(b) for b in found)}


PYTHON_PAGES = _python_pages()


@pytest.mark.parametrize("page", list(PYTHON_PAGES))
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in PYTHON_PAGES[page]:
        exec(compile("\n" * block.line + block.text, str(ROOT / block.page), "exec"), names)


def test_every_block_is_of_a_language_that_a_test_runs() -> None:
    assert {b.language for b in BLOCKS} <= {"python", "sh", "console", "text", "cpp", "cmake"}
    assert sum(b.language == "python" for b in BLOCKS) >= 8


@pytest.mark.parametrize(
    ("language", "source"), [("cpp", "tests/sim/documented.h"), ("cmake", "examples/server/CMakeLists.txt")]
)
def test_what_needs_another_compiler_is_compiled_elsewhere(language: str, source: str) -> None:
    """Each line of these blocks stands, in this order, in a file that other tests compile."""
    lines = [line.strip() for line in (ROOT / source).read_text(encoding="utf-8").splitlines()]
    for block in (b for b in BLOCKS if b.language == language):
        rest = iter(lines)
        for line in block.text.splitlines():
            code = re.split(r"\s+#\s|(?<!:)//", line)[0].strip() if not line.startswith("#include") else ""
            if code and not code.startswith(("#", "target_link_libraries(main")):
                assert any(code == other or code == other.split("//")[0].strip() for other in rest), f"{block}: {code}"


# -- commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that commands in the docs name."""
    for name in ("run.json", "trace.jsonl", "model.pt2", "program.py"):
        (tmp_path / name).touch()
    for name in ("examples", "benchmarks", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("sandbox")
def test_programs_take_the_commands_that_the_docs_give_them() -> None:
    """One test for all of them, so that their number may change. It runs none; the parser of each program takes it."""
    assert len(COMMANDS) > 30
    refused = []
    for where, command in COMMANDS:
        try:
            for inner in re.findall(r"\$\(([^)]*)\)", command):
                _parse(shlex.split(inner))
            _parse(shlex.split(re.sub(r"\$\([^)]*\)", "SUBSTITUTED", command), comments=True))
        except (Exception, SystemExit) as e:
            refused.append(f"{where}: {command}: {type(e).__name__}: {e}")
    assert not refused, "\n".join(refused)


def _parse(words: list[str]) -> None:
    """Have the program's own parser take the arguments; fail for a program that this test does not know."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program, *arguments = words
    if program == "anabranch":
        _anabranch(arguments)
    elif program == "python" and arguments[:2] == ["-m", "anabranch"]:
        _anabranch(arguments[2:])
    elif program == "python" and arguments[:2] == ["-m", "anabranch.cpp"]:
        from anabranch.cpp.__main__ import main

        with main.make_context("anabranch.cpp", arguments[2:]):
            pass
    elif program == "python":
        _script(ROOT / arguments[0], arguments[1:])
    elif program == "pip":
        given = " ".join(arguments)
        extra = re.fullmatch(r"install anabranch\[(\w+)\]", given)
        if extra:
            assert re.search(rf"^{extra[1]} = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
        else:  # test_wheel.py runs these
            assert given in (
                "install setuptools>=77",
                "install ./anabranch-*.whl",
                "wheel . --no-deps --no-build-isolation",
            ), given
    elif program == "make":
        for target in arguments:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), target
    elif program == "./server":
        usage = (ROOT / "examples/server/server.cpp").read_text(encoding="utf-8")
        for option in (a for a in arguments if a.startswith("--")):
            assert f'word == "{option}"' in usage
    elif program == "cd":
        assert (ROOT / arguments[0]).is_dir()
    elif program == "g++":
        assert arguments[-2] == "-o"
    elif program.startswith("scripts/"):
        assert (ROOT / program).exists()
    else:
        assert program in ("rsync", "tar"), f"{program}: no test knows how to parse its arguments"


def _anabranch(arguments: list[str]) -> None:
    from anabranch.cli import main

    if not arguments or arguments[0].startswith("-"):
        return
    command = main.get_command(click.Context(main), arguments[0])
    assert command is not None, arguments[0]
    if not arguments[1:]:  # the name of a command, in running text
        return
    try:
        with command.make_context(arguments[0], list(arguments[1:])):
            pass
    except click.exceptions.Exit as end:  # --help
        if end.exit_code != 0:
            raise


def _load(path: Path) -> Any:
    """A program of this repository as a module; it finds the files beside it, as when it runs."""
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        spec.loader.exec_module(module)
    return module


def _script(path: Path, arguments: list[str]) -> None:
    """A program of this repository: click's parser takes the options, or its source declares them."""
    main = _load(path).main
    if isinstance(main, click.Command):
        with main.make_context(path.name, list(arguments)):
            return
    options = path.read_text(encoding="utf-8")
    for option in (a for a in arguments if a.startswith("-")):
        assert f'"{option}"' in options, option

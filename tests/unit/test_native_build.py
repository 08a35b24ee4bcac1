"""The build helper: once, safely from many processes, and with an error that says what to install."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from anabranch._toolchain import build, cache_folder
from anabranch.errors import BuildError


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n', encoding="utf-8")
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n", encoding="utf-8")
    return path


def test_builds_once_and_again_when_a_header_changes(source: Path) -> None:
    said: list[str] = []
    first = build("answer", [source], progress=said.append)
    assert first.parent == cache_folder()
    assert ctypes.CDLL(str(first)).answer() == 42
    assert len(said) == 2
    assert "compiling answer" in said[0]
    assert build("answer", [source], progress=said.append) == first
    assert len(said) == 2
    (source.parent / "answer.h").write_text("#define ANSWER 43\n", encoding="utf-8")
    second = build("answer", [source], progress=said.append)
    assert ctypes.CDLL(str(second)).answer() == 43
    assert build("answer", [source], flags=["-O0"], progress=said.append) not in (first, second)


def test_sources_are_one_unit_or_two(tmp_path: Path, source: Path) -> None:
    # Two names that are the same and belong to one source each: apart they may be, together not.
    folder = tmp_path / """it's a "folder" of ours"""
    folder.mkdir()
    sources = [folder / "first.cpp", folder / "second.cpp"]
    for value, path in enumerate(sources, 1):
        text = f'static int value() {{ return {value}; }}\nextern "C" int {path.stem}() {{ return value(); }}\n'
        path.write_text(text, encoding="utf-8")
    with pytest.raises(BuildError, match="redefinition"):
        build("values", sources, progress=lambda _: None)
    library = ctypes.CDLL(str(build("values", sources[:1], beside=sources[1:], progress=lambda _: None)))
    assert (library.first(), library.second()) == (1, 2)


def test_the_grouping_of_sources_is_part_of_the_name(source: Path) -> None:
    (source.parent / "other.cpp").write_text('extern "C" int other() { return 7; }\n', encoding="utf-8")
    sources = [source, source.parent / "other.cpp"]
    libraries = {build("answer", sources[:n], beside=sources[n:], progress=lambda _: None) for n in (1, 2)}
    assert len(libraries) == 2
    for library in libraries:
        assert ctypes.CDLL(str(library)).answer() + ctypes.CDLL(str(library)).other() == 49


def test_many_processes_at_once(source: Path) -> None:
    code = (
        "from anabranch._toolchain import build; from pathlib import Path; "
        f"print(build('answer', [Path({str(source)!r})]))"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = [job.communicate()[0].strip() for job in jobs]
    assert len(set(outputs)) == 1
    assert ctypes.CDLL(outputs[0]).answer() == 42
    assert [p.name for p in cache_folder().iterdir()] == [Path(outputs[0]).name]  # nothing half-written is left


def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(source.parent))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"apt install g\+\+"):
        build("answer", [source])
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="CXX is 'no-such-compiler'"):
        build("answer", [source])


def test_compiler_output_is_in_the_error(source: Path) -> None:
    source.write_text("int answer() { return nothing; }\n", encoding="utf-8")
    with pytest.raises(BuildError, match="nothing"):
        build("answer", [source], progress=lambda _: None)
    assert list(cache_folder().iterdir()) == []


def test_warnings_are_errors(source: Path) -> None:
    source.write_text("int answer(int unused) { return 1; }\n", encoding="utf-8")
    with pytest.raises(BuildError, match="unused"):
        build("answer", [source], progress=lambda _: None)


def test_cache_that_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = source.parent / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(BuildError, match="set XDG_CACHE_HOME"):
        build("answer", [source], progress=lambda _: None)

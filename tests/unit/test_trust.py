"""Compiled libraries are loaded from the cache only where nobody but the user can have written them."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from anabranch import _trust
from anabranch._toolchain import build, cache_folder, cache_root
from anabranch.errors import BuildError

_ANOTHER = 4242


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_root()


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Gives a file, folder or link to another user; who is not root and cannot sees it so at least."""

    def give(path: Path) -> None:
        if os.getuid() == 0:
            os.chown(path, _ANOTHER, -1, follow_symlinks=False)
            return
        look = Path.lstat

        def lstat(self: Path) -> os.stat_result:
            status = look(self)
            return os.stat_result((*status[:4], _ANOTHER, *status[5:])) if self == path else status

        monkeypatch.setattr(Path, "lstat", lstat)

    return give


@pytest.fixture
def made(tmp_path: Path, cache: Path) -> Callable[[list[str]], Path]:
    """Builds the library whose `answer()` is 42; what is said comes into the list."""
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n', encoding="utf-8")
    return lambda said: build("answer", [source], progress=said.append)


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def _group_writes(path: Path) -> None:
    path.chmod(0o720)


def _all_write(path: Path) -> None:
    path.chmod(0o702)


def _a_link(path: Path) -> None:
    path.rename(path.parents[3] / "elsewhere.so")
    path.symlink_to(path.parents[3] / "elsewhere.so")


@pytest.mark.parametrize("kind", ["another's", _group_writes, _all_write, _a_link])
def test_a_file_that_another_can_have_written_is_compiled_anew_in_its_place(
    kind: str | Callable[[Path], None], made: Callable[[list[str]], Path], give_away: Callable[[Path], None]
) -> None:
    library = made([])
    library.write_bytes(b"planted")
    spoil = give_away if isinstance(kind, str) else kind
    spoil(library)
    status = library.lstat()
    said: list[str] = []
    if isinstance(kind, str) and os.getuid() != 0:
        with pytest.raises(BuildError, match="does not belong to"):  # it still looks so once it has been made anew
            made(said)
    else:
        assert made(said) == library
        assert (answer(library), library.is_symlink(), library.stat().st_mode & 0o777) == (42, False, 0o700)
    assert len(said) == 3
    assert str(library) in said[0]
    assert f"mode {status.st_mode & 0o7777:04o}" in said[0]
    if isinstance(kind, str):
        assert f"owner {_ANOTHER}" in said[0]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
@pytest.mark.parametrize("folder", ["native", "anabranch"])
def test_a_folder_of_ours_that_was_open_is_closed(
    folder: str, mode: int, cache: Path, made: Callable[[list[str]], Path]
) -> None:
    library = made([])
    other = library.with_name("other.so")
    other.write_bytes(b"planted")
    open_to_others = library.parent if folder == "native" else library.parents[1]
    if folder == "native":
        library.write_bytes(b"planted")
    open_to_others.chmod(mode)
    # In a sticky folder nobody could move what is in it; where libraries lie, even that is not allowed.
    closes = folder == "native" or mode != 0o1777
    assert (_trust.objection(library, cache) is not None) == closes
    assert answer(made([])) == 42
    assert _trust.objection(library, cache) is None
    assert open_to_others.stat().st_mode & 0o7777 == (mode & 0o7755 if closes else mode)
    assert other.exists() == (folder == "anabranch")  # what lay in an open folder may have been put there by others


def _root_open(root: Path, give_away: Callable[[Path], None]) -> Path:
    root.chmod(0o777)
    return root


def _root_of_the_group(root: Path, give_away: Callable[[Path], None]) -> Path:
    root.chmod(0o775)
    os.chown(root, -1, _ANOTHER) if os.getuid() == 0 else None
    return root


def _root_of_another(root: Path, give_away: Callable[[Path], None]) -> Path:
    give_away(root)
    return root


def _native_of_another(root: Path, give_away: Callable[[Path], None]) -> Path:
    give_away(root / "anabranch/native")
    return root / "anabranch/native"


def _link_of_another(root: Path, give_away: Callable[[Path], None]) -> Path:
    root.rename(root.with_name("target"))
    root.symlink_to("target")
    give_away(root)
    return root


def _link_to_an_open_folder(root: Path, give_away: Callable[[Path], None]) -> Path:
    native = root / "anabranch/native"
    native.rename(root.with_name("target"))
    native.symlink_to(root.with_name("target"))
    root.with_name("target").chmod(0o777)
    return native


@pytest.mark.parametrize(
    "spoil",
    [
        _root_open,
        _root_of_the_group,
        _root_of_another,
        _native_of_another,
        _link_of_another,
        _link_to_an_open_folder,
    ],
)
def test_a_folder_that_is_not_ours_to_close_is_an_error_that_says_what_to_do(
    spoil: Callable[[Path, Callable[[Path], None]], Path],
    cache: Path,
    made: Callable[[list[str]], Path],
    give_away: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_trust, "_is_private", lambda group: False)
    library = made([])
    folder = spoil(cache, give_away)
    mode = folder.stat().st_mode & 0o7777
    assert _trust.objection(library, cache) is not None
    with pytest.raises(BuildError) as error:
        made([])
    said = str(error.value)
    assert f"{folder} (owner " in said
    assert "set XDG_CACHE_HOME" in said
    assert (f"chmod go-w {folder}" in said and f"mode {mode:04o}" in said) or (
        f"owner {_ANOTHER}" in said and f"chown -h {pwd.getpwuid(os.getuid()).pw_name} {folder}" in said
    )


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_what_is_made_under_any_umask_is_for_the_user_alone(
    umask: None, cache: Path, made: Callable[[list[str]], Path]
) -> None:
    library = made([])
    assert {p.stat().st_mode & 0o777 for p in (cache, *library.parents[:2], library)} == {0o700}
    said: list[str] = []
    assert made(said) == library
    assert said == []


@pytest.mark.parametrize("kind", ["sticky", "link of ours"])
def test_a_root_in_which_nobody_can_move_our_folder_will_do(
    kind: str, cache: Path, made: Callable[[list[str]], Path]
) -> None:
    library = made([])
    if kind == "sticky":
        cache.chmod(0o1777)
    else:
        cache.rename(cache.with_name("target"))
        cache.symlink_to("target")
    said: list[str] = []
    assert made(said) == library
    assert said == []


@pytest.mark.parametrize(
    ("uid", "gid", "name", "members", "private"),
    [
        (1000, 1000, "ann", [], True),
        (1000, 1000, "ann", ["ann"], True),
        (1000, 1000, "ann", ["ann", "bob"], False),
        (1000, 1000, "users", [], False),
        (1000, 1001, "ann", [], False),
        (0, 0, "ann", [], False),
    ],
)
def test_a_private_group_is_named_like_its_only_member(
    uid: int, gid: int, name: str, members: list[str], private: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: uid)
    user = SimpleNamespace(pw_uid=uid, pw_gid=gid, pw_name="ann")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: user)
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=name, gr_mem=members))
    group = 0 if uid == 0 else 1000
    assert _trust._is_private(group) == private


def test_a_folder_above_ours_may_be_writable_for_the_private_group(
    cache: Path, made: Callable[[list[str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trust, "_is_private", lambda group: True)
    library = made([])
    cache.chmod(0o775)
    assert _trust.objection(library, cache) is None
    library.parent.chmod(0o775)  # not where the libraries lie
    assert _trust.objection(library, cache) is not None
    cache.chmod(0o777)
    assert _trust.objection(library, cache) is not None


def test_nothing_of_the_cache_folder_is_looked_at_above_its_root(
    cache: Path, made: Callable[[list[str]], Path]
) -> None:
    library = made([])
    cache.parent.chmod(0o777)
    assert _trust.objection(library, cache_folder().parents[1]) is None

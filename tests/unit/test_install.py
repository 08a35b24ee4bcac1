"""``scripts/install`` with an interpreter that only writes down what it is asked to do, and ``scripts/compile``."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: In place of .venv/bin/python. `fail` and `hang` hold a word of the command that is to fail, or never to end.
PYTHON = """#!/bin/sh
case "$*" in
-c*version_info*) echo 3.11.7; exit 0 ;;
*--version*) exit 0 ;;
esac
echo "$*" >>asked
if [ -s hang ] && expr "$*" : ".*$(cat hang)" >/dev/null; then
    exec {python} -c 'import os, signal; os.setsid(); open("hangs", "w").write(str(os.getpid())); signal.pause()'
fi
if [ -s fail ] && expr "$*" : ".*$(cat fail)" >/dev/null; then
    while [ -s hang ] && [ ! -s hangs ]; do :; done
    echo "what went wrong" >&2; exit 1
fi
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("scripts/install", "pyproject.toml", "requirements"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(python=sys.executable), encoding="utf-8")
    python.chmod(0o700)
    # Of this machine's programs the script sees neither a GPU's nor another Python.
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (tmp_path / "nvidia-smi").chmod(0o700)
    return tmp_path


@pytest.fixture
def install(clone: Path) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs the script: its exit status, what it wrote, and which of the steps below were asked for, in order."""
    steps = {
        "torch==": "torch",
        "base.txt": "base",
        "dev.txt": "dev",
        "scripts/compile": "compile",
        "editable": "package",
    }

    def run(*arguments: str) -> tuple[int, str, list[str]]:
        (clone / "asked").write_text("", encoding="utf-8")
        environment = {**os.environ, "PATH": f"{clone}:{os.environ['PATH']}", "PYTHON": ".venv/bin/python"}
        done = subprocess.run(
            ["bash", "scripts/install", *arguments],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        asked = (clone / "asked").read_text(encoding="utf-8").splitlines()
        # The compilation runs beside what follows it.
        made = [name for line in asked for word, name in steps.items() if word in line]
        return done.returncode, done.stderr, sorted(made, key=list(steps.values()).index)

    return run


def test_the_demo_installs_less_and_the_rest_can_come_later(install: Callable[..., tuple[int, str, list[str]]]) -> None:
    assert install("demo")[::2] == (0, ["torch", "base", "compile", "package"])
    assert install("demo")[::2] == (0, [])
    assert install()[::2] == (0, ["torch", "base", "dev", "compile", "package"])
    assert install()[::2] == (0, [])
    assert install("demo")[::2] == (0, [])


def test_a_changed_list_of_packages_is_installed(
    clone: Path, install: Callable[..., tuple[int, str, list[str]]]
) -> None:
    assert install()[0] == 0
    for changed in ("dev", "base"):
        path = clone / f"requirements/{changed}.txt"
        path.write_text(path.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
        # The demo does without the packages for tests, whatever they are.
        assert bool(install("demo")[2]) == (changed == "base")
    assert "dev" in install()[2]


@pytest.mark.parametrize("step", ["torch==", "base.txt", "dev.txt", "editable"])
def test_a_failed_step_is_made_again_and_ends_the_compilation(
    clone: Path, install: Callable[..., tuple[int, str, list[str]]], step: str
) -> None:
    (clone / "fail").write_text(step, encoding="utf-8")
    is_compiling = step in ("dev.txt", "editable")
    if is_compiling:
        (clone / "hang").write_text("scripts/compile", encoding="utf-8")
    status, said, _ = install()
    assert status != 0
    assert "what went wrong" in said
    if is_compiling:
        pid = int((clone / "hangs").read_text(encoding="utf-8"))
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline, "the compilation still runs"
    (clone / "fail").unlink()
    (clone / "hang").unlink(missing_ok=True)
    assert install()[::2] == (0, ["torch", "base", "dev", "compile", "package"])


def test_a_failed_compilation_is_shown_and_made_again(
    clone: Path, install: Callable[..., tuple[int, str, list[str]]]
) -> None:
    (clone / "fail").write_text("scripts/compile", encoding="utf-8")
    status, said, made = install("demo")
    assert (status, made) == (1, ["torch", "base", "compile", "package"])
    assert "what went wrong" in said
    assert "C++ could not be compiled (see above)" in said
    (clone / "fail").unlink()
    assert install("demo")[::2] == (0, ["torch", "base", "compile", "package"])


def test_an_unknown_word(install: Callable[..., tuple[int, str, list[str]]]) -> None:
    status, said, made = install("everything")
    assert (status, made) == (2, [])
    assert 'given "everything"; expected "demo" or nothing' in said


def test_a_compilation_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    # As scripts/install ends it: the group gets SIGTERM, while the compiler is at work.
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) echo one; exit ;; esac\necho $$ >>{tmp_path}/started\nexec sleep 600\n',
        encoding="utf-8",
    )
    compiler.chmod(0o700)
    environment = {
        **os.environ,
        "CXX": str(compiler),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path),
    }
    job = subprocess.Popen([sys.executable, ROOT / "scripts/compile"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    started = tmp_path / "started"
    while not started.exists() or len(started.read_text().split()) < 2:  # both units of the simulator
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(60) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in started.read_text().split())
    assert [p.name for p in (tmp_path / "cache/anabranch/native").iterdir()] == []
    assert not list(tmp_path.glob("anabranch-*"))

"""The C++ sources: formatted, and nowhere a file that should be two."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anabranch.race import _library

ROOT = Path(__file__).parents[2]
FILES = sorted(
    [*_library.FOLDER.glob("*.cpp"), *_library.FOLDER.glob("*.h"), Path(__file__).parent / "sanitizer_driver.cpp"]
)


def test_formatted() -> None:
    # Beside the interpreter first: requirements/dev.txt puts it into the virtual environment.
    program = shutil.which("clang-format", path=Path(sys.executable).parent) or shutil.which("clang-format")
    if program is None:
        pytest.skip("no clang-format beside the interpreter or on PATH")
    done = subprocess.run(
        [program, "--dry-run", "--Werror", f"--style=file:{ROOT / '.clang-format'}", *map(str, FILES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_sizes() -> None:
    for file in FILES:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 500, file


def test_no_torch() -> None:
    code = "import sys, anabranch.race, anabranch.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

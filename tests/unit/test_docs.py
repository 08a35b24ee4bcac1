"""The docs say what is so: paths exist, README blocks run, figures come from committed results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_path_named_in_the_layout_exists() -> None:
    text = (ROOT / "docs/layout.md").read_text(encoding="utf-8")
    paths = {p for p in re.findall(r"`([\w./-]+)`", text) if "/" in p}
    assert len(paths) > 15
    missing = sorted(p for p in paths if not (ROOT / p).exists())
    assert not missing


def test_every_folder_of_the_package_is_in_the_layout() -> None:
    text = (ROOT / "docs/layout.md").read_text(encoding="utf-8")
    folders = [p for p in (ROOT / "src/anabranch").iterdir() if p.is_dir() and (p / "__init__.py").exists()]
    assert len(folders) >= 7
    for folder in folders:
        assert f"src/anabranch/{folder.name}/" in text


def test_relative_links_resolve() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_blocks_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_readme_commands_exist() -> None:
    from anabranch.cli import main

    for name in set(re.findall(r"^(?:.*&& )?anabranch (\w+)", README, flags=re.M)):
        assert main.get_command(None, name) is not None, name  # type: ignore[arg-type]


def test_readme_tables_are_those_of_the_committed_results() -> None:
    done = subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

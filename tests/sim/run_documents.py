"""A program: runs what the docs show on the simulated device, each page and each command in a child of this process.

One process loads PyTorch and the device; its children start from there, as a user's fresh process would. Prints JSON: a
line a child, with its exit status and what it printed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

import anabranch.sim
import documents
from anabranch.cli import main
from documents import ROOT


def on_sim(text: str) -> str:
    """A Python block for CUDA as one for the simulated device; TensorRT, which needs a GPU, as the backend eager."""
    for old, new in (
        ('"cuda" if torch.cuda.is_available() else "cpu"', '"sim"'),
        (".cuda()", '.to("sim")'),
        ("torch.cuda.", "torch.sim."),
        ('"cuda"', '"sim"'),
        ('backend="tensorrt"', 'backend="eager"'),
    ):
        text = text.replace(old, new)
    assert "cuda" not in text, text
    return text


def python(blocks: list[documents.Block]) -> Callable[[], None]:
    def run() -> None:
        os.chdir(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
        names: dict[str, object] = {}
        for block in blocks:
            exec(compile("\n" * block.line + on_sim(block.text), str(ROOT / block.page), "exec"), names)

    return run


def command(words: list[str]) -> Callable[[], None]:
    assert words[0] == "anabranch"

    def run() -> None:
        os.chdir(ROOT)
        main(words[1:], prog_name="anabranch")

    return run


def child(run: Callable[[], None]) -> dict[str, object]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                run()
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        return {"status": os.waitstatus_to_exitcode(status), "stdout": out.read(), "stderr": err.read()}


def jobs() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    pages: dict[str, list[documents.Block]] = {}
    for block in documents.blocks():
        if block.language == "python":
            pages.setdefault(block.page, []).append(block)
    for page, blocks in pages.items():
        if any(documents.needs_streams(b) for b in blocks):
            # The six lines at the top of the README are an example, which a command runs.
            found[page] = python([b for b in blocks if not b.text.startswith("engine_stream")])
    for block in documents.blocks():
        if block.output is not None:
            found[str(block)] = command(shlex.split(block.text, comments=True))
    for _, line in documents.commands():
        words = shlex.split(line, comments=True)
        # Those whose output is shown run above.
        shown = (b.text for b in documents.blocks() if b.output is not None)
        if re.match(r"anabranch explore examples/\S+\.py( |$)", line) and words not in map(shlex.split, shown):
            found[" ".join(words)] = command(words)
    return found


if __name__ == "__main__":
    anabranch.sim.reset()
    assert torch.accelerator.is_available()
    print(json.dumps({name: child(run) for name, run in jobs().items()}))

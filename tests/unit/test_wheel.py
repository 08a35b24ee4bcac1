"""A wheel that was built beside PyTorch brings the native runtime along, compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import torch, anabranch
model = torch.nn.ReLU()
engine = anabranch.compile(model, [torch.randn(1, 3, 5)], backend="eager", runtime="native")
x = torch.randn(1, 3, 5)
assert torch.equal(engine(x), model(x))
from anabranch.runtime import _library
print(_library.build())
"""


def test_the_runtime_comes_along_compiled(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("anabranch-*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (library,) = site.glob("anabranch/runtime/_ahead/*.so")
    # Without a compiler and without a cache.
    environment = {**os.environ, "PYTHONPATH": str(site), "CXX": "/nowhere", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(library)]

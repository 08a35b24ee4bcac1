"""The frames in flight of examples/upscale_video.py on real CUDA streams; without the codecs, which stay on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import anabranch
from anabranch.models import upscaler

SCRIPT = Path(__file__).parents[2] / "examples" / "upscale_video.py"
HEIGHT, WIDTH = 90, 160


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module. A GPU host need not have PyAV: nothing here decodes or encodes."""
    if importlib.util.find_spec("av") is None:
        monkeypatch.setitem(sys.modules, "av", ModuleType("av"))
    spec = importlib.util.spec_from_file_location("upscale_video", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype_name", ["float16", "float32"])
@pytest.mark.parametrize("streams", [1, 4, 12])
def test_frames_in_flight_come_back_in_order_and_right(example: ModuleType, streams: int, dtype_name: str) -> None:
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    device, dtype = torch.device("cuda", torch.cuda.current_device()), example.DTYPES[dtype_name]
    try:
        x = torch.zeros(1, 3, HEIGHT, WIDTH, dtype=dtype, device=device)
        engine = anabranch.compile(upscaler().to(device, dtype), inputs=[x], backend="eager", max_contexts=streams)
        engine.warm(contexts=streams)
        slots = [example.CudaSlot(engine, device, dtype, HEIGHT, WIDTH) for _ in range(streams)]
        # Noise, different in every frame: a buffer refilled or read too early cannot go unseen.
        rng = np.random.default_rng(0)
        frames = [rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(60)]
        reference = upscaler().to(device)
        for frame, done in zip(frames, example.in_flight(iter(frames), slots), strict=True):
            assert done.source is frame
            worst, _ = example.compare([done], reference, device)
            assert worst <= example.TOLERANCE[dtype_name]
        engine.close()
    finally:
        torch.backends.cudnn.allow_tf32 = allowed

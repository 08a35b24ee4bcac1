"""What PyTorch's profiler sees of a call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import anabranch
from gpu.support import Gpu


def test_the_kernels_of_a_graph_belong_to_its_launch(gpu: Gpu, runtime: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Softmax(-1)).eval().cuda()
    x = torch.randn(8, 64, device="cuda")
    engine = anabranch.compile(model, [x], runtime=runtime, cuda_graphs=True)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first one starts the profiler's libraries
        with torch.profiler.profile(activities=activities) as profile:
            engine(x)
            torch.cuda.synchronize()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events: list[dict[str, Any]] = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    launches = {e["args"]["correlation"] for e in events if e.get("name") == "cudaGraphLaunch"}
    kernels = [e["args"]["correlation"] for e in events if e.get("cat") == "kernel"]
    assert len(launches) == 1
    assert len(kernels) >= 3
    assert set(kernels) & launches == launches
    if runtime == "native":  # nothing is copied in or out
        assert set(kernels) == launches

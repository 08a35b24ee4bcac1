"""A program, for hosts without pytest: an engine in C++ goes while held streams have yet to use its weights.

``PYTHONPATH=src python3 tests/gpu/cpp_engine.py cuda`` (or ``sim``, where tests/sim/test_cpp_engine.py has more).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from anabranch import _extension, cpp
from anabranch._judge import differences
from anabranch.devices import get_device
from anabranch.runtime import _library

ROUNDS = 20


def build() -> Any:
    name, runtime, header = "anabranch_engine", _library.build(), cpp.include_paths()[0]
    path = _extension._toolchain.build(
        name,
        [Path(__file__).parents[1] / "sim/engine_module.cpp", *cpp.cmake_path().glob("*.cpp")],
        flags=[*_extension.flags(name), f"-I{header}"],
        libraries=[str(runtime), f"-Wl,-rpath,{runtime.parent}", *cpp.link_flags(), "-ltorch_python"],
        headers=[*header.glob("*/*.h"), *_library.FOLDER.glob("*.h")],
    )
    return _extension.load(name, path)


def main(kind: str) -> None:
    seam, core = get_device(kind), build()
    if kind == "sim":
        import anabranch.sim

        core.set_private_device(anabranch.sim.core.native_api())
    device, module = torch.device(kind, 0), torch.get_device_module(kind)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    model = model.eval().requires_grad_(False).to(device)
    streams = [seam.stream(0) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/program"
        cpp.save_program(model, [torch.empty(8, 64, device=device)], file)
        warm = core.Engine(file, device)
        for i in range(ROUNDS):
            inputs = [torch.randn(8, 64).to(device) for _ in streams]
            expected = [model(x).cpu() for x in inputs]
            engine, latches, results = core.Engine(file, device), [], []
            for x, stream in zip(inputs, streams, strict=True):
                with module.stream(stream):
                    warm.run([x])  # loads kernels, makes handles and workspaces: not while a stream is held
            for p in model.parameters():
                torch.full_like(p, float("nan"))
            module.synchronize()
            for x, stream in zip(inputs, streams, strict=True):
                latches.append(seam.latch())
                latches[-1].hold(stream)
                with module.stream(stream):
                    results += engine.run([x])
            engine.destroy()
            # On another stream, where the freed weights would come from first: nothing may overwrite them yet.
            junk = [torch.full_like(p, float("nan")) for p in model.parameters() for _ in range(20)]
            module.current_stream().synchronize()
            for latch in latches:
                latch.open()
            module.synchronize()
            assert not differences([y.cpu() for y in results], list(expected)), f"round {i}"
            del junk
    print(f"{kind}: weights were freed after their last use in {ROUNDS} rounds")


if __name__ == "__main__":
    main(sys.argv[1])

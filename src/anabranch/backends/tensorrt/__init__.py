"""TensorRT engines, with a private execution context for each graph and each call in flight.

``torch.onnx.export`` turns each run of operators into ONNX, TensorRT's own parser takes it, and what either of them
refuses runs as PyTorch operators in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anabranch.backends._backend import Options
from anabranch.backends.tensorrt._builder import Rejected, Target
from anabranch.backends.tensorrt._compiler import Compiled, compile_program
from anabranch.backends.tensorrt._execution import TensorRTKernels
from anabranch.backends.tensorrt._library import library
from anabranch.export import Program

__all__ = ["BACKEND", "Compiled", "Target", "compile_program", "library"]


class _TensorRT:
    name = "tensorrt"

    def lower(self, program: Program, examples: Sequence[torch.Tensor], options: Options) -> TensorRTKernels:
        device = examples[0].device if examples else program.weights[0].device
        target = Target(torch.cuda.get_device_capability(device), ahead=False, tf32=options.tf32)
        compiled = compile_program(library(), program, target, require_full=options.require_full)
        try:
            return TensorRTKernels(compiled, program, device)
        except Rejected as e:
            if not compiled.reused:
                raise
            # What is whole and for this very library can still be refused, by a driver that has changed, say.
            for key in compiled.keys.values():
                compiled.cache.forget("engine", key, str(e))
            compiled = compile_program(library(), program, target, require_full=options.require_full, rebuild=True)
            return TensorRTKernels(compiled, program, device)


BACKEND = _TensorRT()

"""PyTorch's Inductor, ahead of time: no Dynamo, no guards, nothing that could recompile in the middle of a call."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from anabranch.backends._backend import Kernels
from anabranch.errors import BuildError
from anabranch.export import Program


class _Inductor:
    name = "inductor"

    def lower(self, program: Program, examples: Sequence[torch.Tensor]) -> Kernels:
        from torch._inductor import config, standalone_compile

        weights = tuple(program.weights)
        try:
            # fallback_random: random ops draw what eager would draw from the same generator.
            with config.patch(fallback_random=program.direct_only is not None):
                artifact = standalone_compile(
                    copy.deepcopy(program.module),  # the compiler rewrites the graph; the plan still shows the original
                    [*weights, *examples],
                    dynamic_shapes="from_example_inputs",
                )
        except Exception as e:
            raise BuildError(
                f"Inductor could not compile the model: {type(e).__name__}: {e}. backend='eager' runs it without a"
                " compiler."
            ) from e

        def kernels(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            return artifact(*weights, *inputs)

        return kernels


BACKEND = _Inductor()

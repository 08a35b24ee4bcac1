"""PyTorch's own operators, one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anabranch.backends._backend import Kernels, Options
from anabranch.export import Program


class _Eager:
    name = "eager"

    def lower(self, program: Program, examples: Sequence[torch.Tensor], options: Options) -> Kernels:
        # The generated code lets go of each temporary after its last use, which an interpreter loop would not. The
        # bare function is taken: Module.__call__ would look for hooks at every call.
        forward = program.in_place.forward
        weights = tuple(program.weights_for_eager())

        def kernels(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            if torch.is_grad_enabled():  # the weights may require a gradient
                with torch.no_grad():
                    return forward(*weights, *inputs)
            return forward(*weights, *inputs)

        return kernels


BACKEND = _Eager()

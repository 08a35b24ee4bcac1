"""A segment as an ONNX file, by PyTorch's own exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import fx

from anabranch.backends.tensorrt._layout import Layout
from anabranch.backends.tensorrt._rewrite import decompose, rewrite
from anabranch.errors import BuildError
from anabranch.export import undisturbed


class Unconvertible(BuildError):
    """The exporter has no ONNX for an operator; the message is its own."""


class _Physical(torch.nn.Module):
    """``module`` on tensors as they lie in memory: the permutations become part of the network."""

    def __init__(self, module: torch.nn.Module, inputs: Sequence[Layout], outputs: Sequence[Layout]) -> None:
        super().__init__()
        self.module = module
        self._inputs, self._outputs = inputs, outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        entered = [
            x if layout.is_identity else x.permute(layout.inverse)
            for x, layout in zip(tensors, self._inputs, strict=True)
        ]
        results = self.module(*entered)
        return tuple(
            y if layout.is_identity else y.permute(layout.order)
            for y, layout in zip(results, self._outputs, strict=True)
        )


def input_names(n: int) -> list[str]:
    return [f"input_{i}" for i in range(n)]


def output_names(n: int) -> list[str]:
    return [f"output_{i}" for i in range(n)]


def named(inputs: Sequence[Layout], outputs: Sequence[Layout]) -> dict[str, Layout]:
    """Inputs and outputs by their names in the file."""
    names = (*input_names(len(inputs)), *output_names(len(outputs)))
    return dict(zip(names, (*inputs, *outputs), strict=True))


def export(
    module: fx.GraphModule,
    inputs: Sequence[Layout],
    outputs: Sequence[Layout],
    examples: Sequence[torch.Tensor],
    path: Path,
) -> Path:
    """Write ``module`` as ONNX to ``path``, its weights beside it; ``examples`` lie in memory as ``inputs`` say.

    Raises :class:`Unconvertible` with the exporter's message.
    """
    try:
        with torch.no_grad(), undisturbed(), _quiet():
            physical = _Physical(rewrite(module), inputs, outputs)
            exported = torch.export.export(physical, tuple(examples), strict=False)
            program = torch.onnx.export(
                decompose(exported),
                dynamo=True,
                input_names=input_names(len(inputs)),
                output_names=output_names(len(outputs)),
                verbose=False,
            )
            assert program is not None
            # Weights outside the message: one message holds 2 GB at most.
            program.save(str(path), external_data=True)
            # The exporter's optimizer keeps the last graph that it looked at, and with it all weights, on their device.
            for value in program.model.graph.initializers.values():
                value.const_value = None
    except Exception as e:
        raise Unconvertible(f"no ONNX for it: {_innermost(e)}") from None
    return path


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", text)
    return f"PyTorch has none for {'.'.join(operator.groups())}" if operator else f"{type(error).__name__}: {text}"


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of each of its steps, and of packages that are not installed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

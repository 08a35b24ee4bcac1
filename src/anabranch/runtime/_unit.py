"""One program for one signature: what its build, its contexts and its calls share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from anabranch.errors import InputError
from anabranch.export import Program, Signature, finisher, valid_integer
from anabranch.plan._planner import uses_workspace
from anabranch.runtime._flags import Watch
from anabranch.runtime._settings import Settings


class Unit:
    """A program for calls of one signature, with the settings, limits and counters of its engine.

    Threads: any; nothing here changes. Streams: what makes tensors makes them on the current stream.
    """

    def __init__(self, settings: Settings, program: Program, signature: Signature, limits: Any, counters: Any) -> None:
        """``limits``, ``counters``: the engine's, of its runtime. Raises :class:`~anabranch.errors.InputError` where
        the model takes no made-up input."""
        self.settings, self.program, self.limits, self.counters = settings, program, limits, counters
        self.device, self.index, self.torch_device = settings.device, settings.index, settings.torch_device
        self.signature = signature if program.data_dependent or program.is_empty else self._with_integer(signature)
        self.specs = self.signature.tensors
        self.is_lazy = any(spec.is_lazy for spec in self.specs)
        flags = settings.compile_flags if program.asks_default_dtype else settings.flags
        self.watch = Watch(flags, program.module.graph, bool(program.asks_default_dtype))
        #: Whether its products need workspaces that PyTorch keeps by stream.
        self.workspaces = self.device.has_streams and uses_workspace(program)
        #: ``finish(given, results)``: what the model returns, of a call's tensors and what was computed.
        self.finish: Callable[[Sequence[Any], Sequence[torch.Tensor]], Any] = finisher(
            program.outputs, program.structure
        )

    def _with_integer(self, signature: Signature) -> Signature:
        integer, why = valid_integer(self.program.module.graph, signature.tensors, self.program.values)
        if why and self.device.has_streams:
            raise InputError(
                "an engine is built on made-up inputs, and no integer was found that this model takes for all of"
                f" its integer inputs ({signature}): {why}. Tried 0 to 16 and powers of two to 2**20; expected a"
                " model whose indices and divisors one of them makes valid. Clamp them in the model, or leave the"
                " part that does not out of the engine."
            )
        return signature.with_integer(integer)

    def examples(self) -> list[torch.Tensor]:
        """New inputs of this signature with made-up values."""
        made: list[Any] = [s.synthesize(self.torch_device) for s in self.specs]
        return made + self.numbers(self.signature.values) if self.program.takes_numbers else made

    def numbers(self, leaves: Sequence[Any]) -> list[Any]:
        """The inputs that are made of a call's numbers."""
        numbers = self.program.numbers
        return numbers.given(leaves, self.torch_device) if numbers is not None else []

    def takes(self, leaves: Sequence[Any]) -> bool:
        """Whether it is right for the numbers of a call that has its signature."""
        numbers = self.program.numbers
        return numbers is None or numbers.values(leaves) is not None

    def inputs(self, leaves: Sequence[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The tensors of a call, and what lies in memory of them, which is what steps read."""
        given = [x for x in leaves if isinstance(x, torch.Tensor)]
        for position, what in self.program.absolute:
            if given[position].storage_offset():
                raise InputError(
                    f"input {position} begins {given[position].storage_offset()} elements into its storage, and the"
                    f" model reads from the storage's beginning ({what}). Pass x.clone(), or leave storage_offset out."
                )
        inputs = given
        if self.is_lazy:
            inputs = [spec.in_memory(x) for spec, x in zip(self.signature.given, given, strict=True)]
        return given, inputs + self.numbers(leaves) if self.program.numbers is not None else inputs

    def canonical(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs with the strides and the alignment that the kernels were compiled (and algorithms chosen) for."""
        tensors = [
            x if spec.matches(x) else spec.empty_like(x, self.torch_device).copy_(x)
            for x, spec in zip(inputs, self.specs, strict=False)
        ]
        return tensors + list(inputs[len(tensors) :])  # and numbers

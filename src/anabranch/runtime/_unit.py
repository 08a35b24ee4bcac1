"""One program for one signature: what its build, its contexts and its calls share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from anabranch.errors import InputError
from anabranch.export import Program, Signature, TensorSpec, alias, finisher, is_integer, shares_memory, valid_integer
from anabranch.plan._planner import uses_workspace
from anabranch.runtime._flags import Watch
from anabranch.runtime._settings import Settings


class CannotWrite(InputError):
    """What the model writes into is memory of other inputs as well, or one place of it is several elements."""


class Unit:
    """A program for calls of one signature, with the settings, limits and counters of its engine.

    Threads: any; nothing here changes. Streams: what makes tensors makes them on the current stream.
    """

    def __init__(
        self,
        settings: Settings,
        program: Program,
        signature: Signature,
        limits: Any,
        counters: Any,
        is_part: bool = False,
    ) -> None:
        """``limits``, ``counters``: the engine's, of its runtime. ``is_part``: of a program in pieces, which has looked
        at what calls are given. Raises :class:`~anabranch.errors.InputError` where the model takes no made-up input."""
        self.settings, self.program, self.limits, self.counters = settings, program, limits, counters
        self.device, self.index, self.torch_device = settings.device, settings.index, settings.torch_device
        self._state = tuple(replace(TensorSpec.of(s.initial), values=_kept(s.initial)) for s in program.state)
        self.signature = signature if program.data_dependent or program.is_empty else self._with_integer(signature)
        #: Of the tensors that the program is given: a call's, a session's, and those made of numbers.
        self.specs = self._specs_of(self.signature)
        #: Names of the state that it takes.
        self.states = tuple(s.name for s in program.state)
        #: Positions of those that it writes into.
        self.written = tuple(sorted(program.written))
        given = 0 if is_part else len(self.signature.given)
        self._written_inputs = tuple(i for i in self.written if i < given)
        self.is_lazy = any(spec.is_lazy for spec in self.specs)
        flags = settings.compile_flags if program.asks_default_dtype else settings.flags
        self.watch = Watch(flags, program.module.graph, bool(program.asks_default_dtype))
        #: Whether its products need workspaces that PyTorch keeps by stream.
        self.workspaces = self.device.has_streams and uses_workspace(program)
        #: ``finish(given, results)``: what the model returns, of a call's tensors and what was computed.
        self.finish: Callable[[Sequence[Any], Sequence[torch.Tensor]], Any] = finisher(
            program.outputs, program.structure
        )

    def _specs_of(self, signature: Signature) -> tuple[TensorSpec, ...]:
        return (*signature.given, *self._state, *signature.numbers)

    def _with_integer(self, signature: Signature) -> Signature:
        specs = self._specs_of(signature)
        integer, why = valid_integer(self.program.module.graph, specs, self.program.values)
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
        made: list[Any] = [s.synthesize(self.torch_device, seed) for seed, s in enumerate(self.specs)]
        return made + self.numbers(self.signature.values) if self.program.takes_numbers else made

    def numbers(self, leaves: Sequence[Any]) -> list[Any]:
        """The inputs that are made of a call's numbers."""
        numbers = self.program.numbers
        return numbers.given(leaves, self.torch_device) if numbers is not None else []

    def takes(self, leaves: Sequence[Any]) -> bool:
        """Whether it is right for the numbers of a call that has its signature."""
        numbers = self.program.numbers
        return numbers is None or numbers.values(leaves) is not None

    def inputs(
        self, leaves: Sequence[Any], state: Sequence[torch.Tensor] = ()
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The tensors of a call, and what lies in memory of them, which is what steps read; ``state``: of a session."""
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
        if self.written:
            inputs = self._to_write(inputs, state)
        elif state:
            inputs = [*inputs, *state]
        return given, inputs + self.numbers(leaves) if self.program.numbers is not None else inputs

    def _to_write(self, given: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of which some are going to be written, as operators may write them.

        Raises :class:`~anabranch.errors.InputError` where eager would not write them, or where others would change.
        """
        tensors = list(given)
        for i in self._written_inputs:
            x = tensors[i]
            for j, y in enumerate(given):
                if i != j and shares_memory(x, y):
                    raise CannotWrite(
                        f"{self.name_of(i)} and {self.name_of(j)} share memory, and the model writes into"
                        f" {self.name_of(i)}. Pass tensors with memory of their own."
                    )
            if any(n > 1 and not s for n, s in zip(x.shape, x.stride(), strict=True)):
                raise CannotWrite(
                    f"{self.name_of(i)} is expanded: one place in its memory stands for several elements, and the model"
                    " writes into it. Pass x.contiguous()."
                )
            if x.is_inference():
                tensors[i] = alias(x)  # which may be written outside of inference mode, where calls run
        tensors += state  # a session's own, which nobody else has
        return tensors

    def name_of(self, position: int) -> str:
        """A tensor that the program is given, for messages."""
        given = len(self.signature.given)
        return f"input {position}" if position < given else f"state {self.program.state[position - given].name!r}"

    def write_back(self, inputs: Sequence[torch.Tensor], used: Sequence[torch.Tensor]) -> None:
        """Kernels have written into ``used``, which are ``inputs`` or copies of them."""
        for i in self.written:
            if used[i] is not inputs[i]:
                inputs[i].copy_(used[i])
        if self.written:
            # Kernels write past PyTorch, which looks at versions where a graph for gradients has kept a tensor.
            torch.autograd.graph.increment_version([inputs[i] for i in self.written])

    def reset(self, inputs: Sequence[torch.Tensor]) -> None:
        """Integers among made-up inputs that a run has written are what they were: a counter may be an index."""
        for i in self.written:
            spec = self.specs[i]
            if is_integer(spec.dtype):
                inputs[i].copy_(spec.values) if spec.values is not None else inputs[i].fill_(spec.integer)

    def renew(self, inputs: Sequence[torch.Tensor]) -> None:
        """Made-up inputs that a run has written are what they were: written ones may all have become alike."""
        for i in self.written:
            inputs[i].copy_(self.specs[i].synthesize(self.torch_device, i))

    def resetting(self, way: Callable[[Sequence[torch.Tensor]], Any]) -> Callable[[Sequence[torch.Tensor]], Any]:
        """``way``, to run it again and again on the same made-up inputs."""
        if not self.written:
            return way

        def run(inputs: Sequence[torch.Tensor]) -> Any:
            self.reset(inputs)
            return way(inputs)

        return run

    def canonical(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs with the strides and the alignment that the kernels were compiled (and algorithms chosen) for."""
        tensors = [
            x if spec.matches(x) else spec.empty_like(x, self.torch_device).copy_(x)
            for x, spec in zip(inputs, self.specs, strict=False)
        ]
        return tensors + list(inputs[len(tensors) :])  # and numbers


def _kept(initial: torch.Tensor) -> torch.Tensor | None:
    """What stands for a state where it is made up: integers are its own, which may be indices."""
    return initial if is_integer(initial.dtype) else None

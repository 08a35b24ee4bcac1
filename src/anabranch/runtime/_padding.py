"""Sizes that are rounded up before a call, where it was shown that this changes nothing but rounding."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch.utils import _pytree as pytree

from anabranch import _judge
from anabranch.errors import UnsupportedModel
from anabranch.export import (
    SPECIAL,
    AliasOutput,
    ComputedOutput,
    Dim,
    NumberOutput,
    Program,
    SizeOutput,
    unflatten,
    valid_integer,
)
from anabranch.export._sizes import plain_size, size_of
from anabranch.runtime._process import neutral
from anabranch.runtime._ranges import Place, resized
from anabranch.runtime._specialization import Specialization

#: What padding of floating inputs holds while it is looked whether results depend on it. Calls have zeros there. No
#: infinity and no NaN: a model that masks by a product with 0 is right.
_POISONS = ("zeros", "random", 1e4, -1e4)
#: How far results may be from those of the same call without padding, relative to the largest: rounding, in TF32 too.
_BOUNDS = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 2e-3, torch.float64: 1e-8}
_BOUNDS |= {torch.complex32: 1e-2, torch.complex64: 2e-3, torch.complex128: 1e-8}


class Padding:
    """The sizes of one engine's inputs that are rounded up to the next of a list.

    Threads: any, once it is made. Streams: tensors are made on the current one.
    """

    def __init__(self, dims: Mapping[Place, Dim]) -> None:
        """``dims``: what was declared, by input and dimension."""
        self._dims = dims
        #: The ranges whose results were looked at.
        self._proved: weakref.WeakSet[Specialization] = weakref.WeakSet()

    def of(self, found: Specialization, leaves: Sequence[Any]) -> Padded | None:
        """A call that ``found`` serves with larger tensors; None where it is right as it is."""
        if found not in self._proved:
            return None
        shapes = {i: list(x.shape) for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)}
        before = [tuple(shape) for shape in shapes.values()]
        for (i, d), dim in self._dims.items():
            shapes[i][d] = dim.padded(shapes[i][d])
        after = [tuple(shape) for shape in shapes.values()]
        sizes = found.program.sizes
        assert sizes is not None  # it is a range
        if after == before or sizes.refuses(after):
            return None
        return Padded(found, leaves, dict(zip(shapes, after, strict=True)))

    def prove(
        self,
        leaves: Sequence[Any],
        serve: Callable[[Sequence[Any]], Specialization | None],
        aside: Callable[[Callable[[], None]], None],
    ) -> None:
        """Have what serves the padded sizes made, and look whether padding changes its results.

        ``leaves``: of a call; ``serve``: gives what serves one; ``aside``: makes a call on a stream of the engine's.
        The host waits. Raises :class:`~anabranch.errors.UnsupportedModel` where padding is not right.
        """
        levels = max(len(dim.pad_to) for dim in self._dims.values())
        for level in range(levels):
            tops = {dim.name: dim.pad_to[min(level, len(dim.pad_to) - 1)] for dim in self._dims.values() if dim.pad_to}
            found = serve(resized(leaves, self._dims, tops))
            if found is None:
                _reject(self._dims, "torch.export does not take the model as a whole")
            if not found.is_range:
                continue  # this size is none of many: nothing is padded to it
            calls = [resized(leaves, self._dims, sizes) for sizes in self._tried(tops)]
            why = _why_never(found.program) or self._why_not(found, calls, aside)
            if why:
                _reject(self._dims, why)
            self._proved.add(found)

    def _why_not(self, found: Specialization, calls: Sequence[Sequence[Any]], aside: Callable[..., None]) -> str:
        answers = [""]

        def look() -> None:
            answers.extend(self._changes(found, call) for call in calls if not _refuses(found, call))

        aside(look)
        return next(filter(None, answers), "")

    def _tried(self, tops: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """Sizes that are padded to ``tops``: each by itself, and all at once; much padding, and little."""
        lows, highs = {}, {}
        for dim in self._dims.values():
            if dim.pad_to:
                top = tops[dim.name]
                below = [n for n in dim.pad_to if n < top]
                lows[dim.name] = min(max([SPECIAL[-1], dim.min - 1, *below]) + 1, top)
                highs[dim.name] = max(top - 1, lows[dim.name])
        for ends in (lows, highs):
            for name in ends if len(ends) > 1 else ():
                yield {**tops, name: ends[name]}
            yield ends

    def _changes(self, found: Specialization, leaves: Sequence[Any]) -> str:
        """How padding a call of these shapes changes its results, or nothing."""
        unit = found.unit
        with neutral(unit.device, unit.index):
            filled = self._filled(found, leaves)
            padded = self.of_any(found, filled)
            if padded is None:
                return ""
            alone = _results(found, filled)
            first: list[torch.Tensor] | None = None
            for poison in _POISONS:
                given = padded.leaves(poison)
                results = padded.cut_results(_results(found, given))
                if first is None:
                    first = results
                    for k, (y, e) in enumerate(zip(results, alone, strict=True)):
                        if not _is_near(y, e):
                            return f"result {k} is another one than without padding: it depends on how many there are"
                for k, (y, e) in enumerate(zip(results, first, strict=True)):
                    if not _has_same_bits(y, e):
                        return f"result {k} mixes them: what is padding changes it"
        return ""

    def of_any(self, found: Specialization, leaves: Sequence[Any]) -> Padded | None:
        """As :meth:`of`, whether or not results were looked at."""
        looked = Padding(self._dims)
        looked._proved.add(found)
        return looked.of(found, leaves)

    def _filled(self, found: Specialization, leaves: Sequence[Any]) -> list[Any]:
        """With values that differ, and, of integers, from what padding has."""
        specs = iter(found.signature.given)
        generator = torch.Generator().manual_seed(7)
        integer = _other_integer(found, leaves)
        made = []
        for x in leaves:
            if not isinstance(x, torch.Tensor):
                made.append(x)
                continue
            spec = next(specs)
            y = torch.empty_strided(tuple(x.shape), spec.strides_for(x.shape), dtype=x.dtype, device=x.device)
            if y.is_floating_point() or y.is_complex():
                drawn = torch.rand(y.shape, generator=generator, dtype=torch.float64)
                y.copy_(drawn * 2 - 1 if not y.is_complex() else torch.complex(drawn, 1 - drawn))
            elif y.dtype is torch.bool:
                y.copy_(torch.rand(y.shape, generator=generator) < 0.75)
            else:
                y.fill_(integer)
            made.append(y)
        return made


class Padded:
    """One call with larger tensors than it was given."""

    def __init__(self, found: Specialization, given: Sequence[Any], shapes: Mapping[int, Sequence[int]]) -> None:
        """``shapes``: that tensors are to have, by their place among the leaves ``given``."""
        self._found, self._given, self._shapes = found, given, shapes

    def leaves(self, poison: str | float = "zeros") -> list[Any]:
        """Of the larger call: what is padding is zero, and in integers what :func:`valid_integer` has found."""
        made = list(self._given)
        specs = iter(self._found.signature.given)
        for i, shape in self._shapes.items():
            spec, x = next(specs), self._given[i]
            if tuple(x.shape) == tuple(shape):
                continue
            made[i] = torch.empty_strided(tuple(shape), spec.strides_for(shape), dtype=x.dtype, device=x.device)
            _fill(made[i], spec.integer, poison)
            _first(made[i], x.shape).copy_(x)
        return made

    def call(self, structure: pytree.TreeSpec) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords of the larger call."""
        args, kwargs = unflatten(self.leaves(), structure)
        return args, kwargs

    def cut(self, result: Any) -> Any:
        """What the call returns, made of what the larger one has returned: new tensors where that is larger."""
        program = self._found.program
        leaves, structure = pytree.tree_flatten(result, is_leaf=lambda x: isinstance(x, torch.Size))
        wanted = self._wanted()
        for k, output in enumerate(program.outputs):
            if isinstance(output, ComputedOutput):
                leaves[k] = _cut(leaves[k], wanted[output.index])
        return pytree.tree_unflatten(leaves, structure)

    def cut_results(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same of what is computed."""
        return [_cut(y, shape) for y, shape in zip(results, self._wanted(), strict=True)]

    def _wanted(self) -> list[tuple[int, ...]]:
        """Shapes of what is computed, of the call as it was given."""
        program = self._found.program
        assert program.sizes is not None
        values = program.sizes.values([tuple(self._given[i].shape) for i in self._shapes])
        results: Any = program.module.graph.output_node().args[0]
        return [tuple(size_of(plain_size(n), values) for n in node.meta["val"].shape) for node in results]


def _cut(y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return y if tuple(y.shape) == tuple(shape) else _first(y, shape).clone()


def _first(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A view of the first elements of each dimension."""
    for d, n in enumerate(shape):
        x = x.narrow(d, 0, n)
    return x


def _fill(x: torch.Tensor, integer: int, poison: str | float) -> None:
    is_floating = x.is_floating_point() or x.is_complex()
    if not is_floating:
        x.fill_(integer if x.dtype is not torch.bool else 0)
    elif poison == "random":
        drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
        x.copy_(3 - 6 * drawn)
    else:
        x.fill_(0.0 if isinstance(poison, str) else poison)


def _results(found: Specialization, leaves: Sequence[Any]) -> list[torch.Tensor]:
    """What is computed of a call. It counts as none."""
    _, inputs = found.unit.inputs(leaves)
    return list(found.calls.direct.run(inputs))


def _refuses(found: Specialization, leaves: Sequence[Any]) -> str:
    assert found.program.sizes is not None
    return found.program.sizes.refuses([tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor)])


def _other_integer(found: Specialization, leaves: Sequence[Any]) -> int:
    """An integer that is valid in a call of these shapes, and if there is one not what padding has."""
    specs = [replace(s, shape=tuple(x.shape)) for s, x in zip(found.signature.given, _tensors(leaves), strict=True)]
    assert found.program.sizes is not None
    values = found.program.sizes.values([spec.shape for spec in specs])
    used = {spec.integer for spec in specs}
    other, why = valid_integer(found.program.module.graph, specs, values, but=used)
    return max(used) if why else other


def _tensors(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [x for x in leaves if isinstance(x, torch.Tensor)]


def _why_never(program: Program) -> str:
    """Why a call with larger tensors does something else than the call itself, whatever is in them; or nothing."""
    if program.written:
        return "it writes into inputs or state"
    if program.is_random:
        return "it draws random numbers, more of them for more elements"
    if program.data_dependent:
        return f"it is {program.direct_only}"
    if any(isinstance(o, AliasOutput) and o.weight is None for o in program.outputs):
        return "it hands back an input, or a view of one"
    results: Any = program.module.graph.output_node().args[0]
    numbers = any(isinstance(o, NumberOutput | SizeOutput) for o in program.outputs)
    if numbers or not all(isinstance(node.meta.get("val"), torch.Tensor) for node in results):
        return "sizes are among its results"
    return ""


def _is_near(y: torch.Tensor, expected: torch.Tensor) -> bool:
    if y.dtype not in _BOUNDS:
        return torch.equal(y, expected)
    return y.shape == expected.shape and _judge.error(y, expected) <= _BOUNDS[y.dtype]


def _has_same_bits(y: torch.Tensor, expected: torch.Tensor) -> bool:
    a, b = (x.cpu().contiguous().reshape(-1).view(torch.uint8) for x in (y, expected))
    return torch.equal(a, b)


def _reject(dims: Mapping[Place, Dim], why: str) -> NoReturn:
    names = ", ".join(dict.fromkeys(repr(dim.name) for dim in dims.values() if dim.pad_to))
    raise UnsupportedModel(
        f"pad_to was given for {names}, and this model cannot be given more rows than there are: {why}. Leave pad_to"
        " out, or have the model mask what is padding: of floating inputs it is 0, of masks False."
    )

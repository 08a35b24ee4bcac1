"""Numbers of a call that become inputs of a program, instead of a part of its signature.

``torch.export`` writes a Python number into the graph as the value that it has. For a number that varies from call to
call the model is traced with a stand-in: an object that PyTorch takes for a number without a known value, and that
notes what Python computes of it. Whatever else looks at its value (a branch, ``float(x)``, ``math.sqrt(x)``, a size, a
key, a text) is noted and raises :class:`NotCarried`: then the value stays a part of the signature.

What Python computes of the numbers (``1 / sigma``) is computed by Python in each call, and each result that an operator
takes is an input of the graph.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from anabranch.export import _operators
from anabranch.export._operators import NAMESPACE
from anabranch.export._random import is_random
from anabranch.export._signature import TensorSpec

_aten = torch.ops.aten
_TORCH = str(Path(torch.__file__).parent)
_PACKAGE = str(Path(__file__).parents[1])
#: The stand-in of expression ``k`` is the item of a tensor that is filled with this and ``k``: no model has it.
_MARK = (1 << 52) + 7_654_321
_ITEMS = (_aten.item.default, _aten._local_scalar_dense.default)
_MOST = 1 << 16


class NotCarried(Exception):
    """A number cannot be an input. ``reasons``: by its position among the leaves of the call."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__("; ".join(dict.fromkeys(reasons.values())))
        self.reasons = dict(reasons)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.export prints the graph of an exception that takes one.
        if name != "partial_fx_graph":
            super().__setattr__(name, value)


@dataclass(frozen=True)
class Expression:
    """A number of the call (``function`` is None, the one argument is its position), or what Python makes of some."""

    function: Callable[..., Any] | None
    arguments: tuple[Any, ...]
    kind: type

    def of(self, leaves: Sequence[Any]) -> Any:
        """Its value for these leaves of a call. Raises what Python raises."""
        if self.function is None:
            return leaves[self.arguments[0]]
        return self.function(*(x.of(leaves) if isinstance(x, Expression) else x for x in self.arguments))

    def positions(self) -> set[int]:
        """Of the numbers that it is made of."""
        if self.function is None:
            return {self.arguments[0]}
        return {p for x in self.arguments if isinstance(x, Expression) for p in x.positions()}


@dataclass(frozen=True)
class NumberInput:
    """An input of a program that is made of a call's numbers.

    ``dtype`` None: the number itself, for an operator that PyTorch runs; else a tensor of no dimensions. ``finite``:
    NaN is no value of it.
    """

    expression: Expression
    dtype: torch.dtype | None = None
    finite: bool = False

    @property
    def spec(self) -> TensorSpec:
        assert self.dtype is not None
        return TensorSpec((), (), self.dtype)

    def value(self, leaves: Sequence[Any]) -> Any:
        """Its value in a call; None where the program is not right for that."""
        try:
            value: Any = self.expression.of(leaves)
        except Exception:
            return None
        kind: Any = self.expression.kind
        if type(value) is not kind:
            return None  # a power of a negative number is complex, one of an integer may be a fraction
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return None
        dtype = self.dtype
        if math.isnan(value):
            return None if self.finite else value
        if dtype is None or (math.isinf(value) and dtype.is_floating_point):
            return value
        limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        return value if limits.min <= value <= limits.max else None


@dataclass(frozen=True)
class Numbers:
    """The numbers that a program takes after its tensors, and the positions in a call of those that they come from."""

    inputs: tuple[NumberInput, ...]
    positions: tuple[int, ...]
    #: Why they are not tensors, if they are not.
    as_numbers: str = ""

    def values(self, leaves: Sequence[Any]) -> list[Any] | None:
        """One for each input, or None where a program that has this call's numbers written into it has to be used."""
        made = [x.value(leaves) for x in self.inputs]
        return None if any(x is None for x in made) else made

    def explain(self) -> str:
        which = ", ".join(map(str, self.positions))
        how = f"as numbers, on backend eager: {self.as_numbers}" if self.as_numbers else "as tensors of no dimensions"
        return f"serves all values of the number(s) at input {which}; operators take them {how}"

    def given(self, leaves: Sequence[Any], device: torch.device) -> list[Any]:
        """What a program is called with. Tensors are filled by kernels on the current stream; nothing is copied."""
        made = self.values(leaves)
        assert made is not None
        return [
            value if x.dtype is None else torch.full((), value, dtype=x.dtype, device=device)
            for x, value in zip(self.inputs, made, strict=True)
        ]


# -- the trace --------------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """What one trace does with the numbers at ``positions`` of a call's leaves."""

    positions: frozenset[int]
    expressions: list[Expression] = field(default_factory=list)
    #: Numbers whose value was looked at, with the line.
    seen: dict[int, str] = field(default_factory=dict)
    #: What it was given for them.
    given: dict[int, Any] = field(default_factory=dict)
    #: Whether the trace has ended: a stand-in that the model kept somewhere then gives its value to whoever finds it.
    is_over: bool = False
    #: By the name of PyTorch's symbol: the expression.
    symbols: dict[str, Expression] = field(default_factory=dict)

    def enter(self, inputs: Any) -> Any:
        """``inputs`` with stand-ins for the numbers."""
        leaves, structure = pytree.tree_flatten(inputs)
        self.given = {p: leaves[p] for p in self.positions}
        for p in self.positions:
            leaves[p] = self.stand_in(Expression(None, (p,), type(leaves[p])), leaves[p])
        return pytree.tree_unflatten(leaves, structure)

    def stand_in(self, expression: Expression, value: Any) -> Any:
        """A stand-in for an expression, which has this value in the call that is traced."""
        self.expressions.append(expression)
        mark = _MARK + len(self.expressions) - 1
        is_float = expression.kind is float
        with torch._C.DisableTorchFunction():
            filled = torch.full((), mark, dtype=torch.float64 if is_float else torch.int64, device="cpu")
            item: Any = filled.item()
        made: Any = (_Float if is_float else _Int)(item.node)
        made._recorder, made._expression, made._value = self, expression, value
        self.symbols[str(item.node.expr)] = expression
        for name in _GUARDS:
            if hasattr(item.node, name):
                setattr(item.node, name, lambda *a, made=made, **k: self.look(made, "an operator needs its value"))
        return made

    def look(self, number: Any, how: str) -> NoReturn:
        """Its value is asked for."""
        self.pin(number._expression.positions(), f"{how}{_line()}")

    def pin(self, positions: Iterable[int], why: str) -> NoReturn:
        for p in positions:
            self.seen.setdefault(p, why)
        raise NotCarried(self.seen)

    def check(self, error: Exception | None = None) -> None:
        """Raise if a value was looked at, even where the model caught what that raised; or if ``error`` is given."""
        if self.seen:
            raise NotCarried(self.seen) from error
        if isinstance(error, NotCarried):
            raise error
        if error is not None:
            found = {p for name in re.findall(r"\b[uz]\w*\d+\b", str(error)) for p in self._named(name)}
            why = f"it cannot be traced without its value: {(str(error).splitlines() or [type(error).__name__])[0]}"
            raise NotCarried(dict.fromkeys(found or self.positions, why)) from error

    def _named(self, symbol: str) -> set[int]:
        expression = self.symbols.get(symbol)
        return expression.positions() if expression is not None else set()

    def check_result(self, result: Any) -> None:
        """A number that the model returns has to be one."""
        for x in pytree.tree_leaves(result, is_leaf=lambda y: isinstance(y, torch.Size)):
            parts: Iterable[Any] = x if isinstance(x, torch.Size) else (x,)
            for part in parts:
                if _is_stand_in(part):
                    self.pin(part._expression.positions(), "the model returns it")


class TakesNumbers(TorchFunctionMode):
    """While it is on, what PyTorch cannot trace with a stand-in is called in another way.

    ``as_tensor`` and ``new_tensor`` are ``torch.tensor``. A power is an operator of ours until :func:`bind` has it: to
    trace its own, PyTorch before 2.13 asks whether the exponent is 1.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _POWERS and "out" not in kwargs:
            base, exponent = _power_of(func, *args, **kwargs)
            if _is_stand_in(exponent) and isinstance(base, torch.Tensor):
                return _powers()[0](base, exponent)
            if _is_stand_in(base) and isinstance(exponent, torch.Tensor):
                return _powers()[1](base, exponent)
        if func is torch.as_tensor and args and _has_stand_in(args[0]):
            options: dict[str, Any] = {**dict(zip(("dtype", "device"), args[1:], strict=False)), **kwargs}
            return torch.tensor(args[0], **options)
        if func is torch.Tensor.new_tensor and len(args) > 1 and _has_stand_in(args[1]):
            options = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            return torch.tensor(args[1], **options)
        return func(*args, **kwargs)


_POWERS = (torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.Tensor.__rpow__)


def _power_of(func: Any, input: Any, exponent: Any) -> tuple[Any, Any]:
    return (exponent, input) if func is torch.Tensor.__rpow__ else (input, exponent)


@functools.cache
def _powers() -> tuple[Any, Any]:
    """Of a tensor, and of a number. Defined once, at the first trace."""
    library = _operators.library()
    library.define("tensor_power(Tensor self, Scalar exponent) -> Tensor")
    library.define("number_power(Scalar self, Tensor exponent) -> Tensor")
    torch.library.register_fake(f"{NAMESPACE}::tensor_power", _power, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::number_power", lambda x, y: _power(y, x), lib=library)
    return torch.ops.anabranch.tensor_power.default, torch.ops.anabranch.number_power.default


def _power(tensor: torch.Tensor, number: Any) -> torch.Tensor:
    """A product, which has the type and the layout of the power."""
    return tensor * (1.0 if isinstance(number, float | torch.SymFloat) else 1)


def _has_stand_in(data: Any) -> bool:
    if isinstance(data, list | tuple):
        return any(map(_has_stand_in, data))
    return _is_stand_in(data)


def _line() -> str:
    """The model's line that is running, for messages."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _PACKAGE, "<")):
            return f" ({Path(name).name}:{frame.f_lineno})"
        frame = frame.f_back
    return ""


#: Of PyTorch's node behind a number: what asks for its value.
_GUARDS = (
    *("guard_int", "guard_float", "guard_bool", "guard_or_false", "guard_or_true", "expect_true", "expect_size"),
    *("guard_size_oblivious", "statically_known_true", "int_", "bool_"),
)


def _is_stand_in(x: Any) -> bool:
    return type(x) in (_Float, _Int)


def _computed(function: Callable[..., Any], *given: Any) -> Any:
    """A stand-in for what Python computes; NotImplemented where something else than numbers is given."""
    if any(not _is_stand_in(x) and type(x) not in (int, float, bool) for x in given):
        return NotImplemented
    first = next(x for x in given if _is_stand_in(x))
    recorder = first._recorder
    if recorder.is_over:
        return function(*(x._value if _is_stand_in(x) else x for x in given))
    positions = {p for x in given if _is_stand_in(x) for p in x._expression.positions()}
    try:
        value = function(*(x._value if _is_stand_in(x) else x for x in given))
    except Exception as e:
        recorder.pin(positions, f"Python refuses it: {e}{_line()}")
    if type(value) not in (int, float):
        recorder.pin(positions, f"Python makes a {type(value).__name__} of it{_line()}")
    arguments = tuple(x._expression if _is_stand_in(x) else x for x in given)
    return recorder.stand_in(Expression(function, arguments, type(value)), value)


def _method(function: Callable[..., Any], reflected: bool = False) -> Any:
    if reflected:
        return lambda self, other: _computed(function, other, self)
    return lambda self, *others: _computed(function, self, *others)


def _looking(how: str, name: str) -> Any:
    def look(self: Any, *args: Any) -> Any:
        if self._recorder.is_over:
            return getattr(self._value, name)(*args)
        self._recorder.look(self, how)

    return look


def _asked(name: str) -> Any:
    def look(self: Any) -> Any:
        return getattr(self._value, name) if self._recorder.is_over else self._recorder.look(self, f"{name} is asked")

    return property(look)


def _compared(name: str) -> Any:
    def compare(self: Any, other: Any) -> Any:
        if self._recorder.is_over:
            return getattr(self._value, name)(other._value if _is_stand_in(other) else other)
        if _is_stand_in(other) or type(other) in (int, float, bool, complex):
            self._recorder.look(self, "it is compared")
        return NotImplemented

    return compare


def _text(name: str) -> Any:
    def text(self: Any, *args: Any) -> Any:
        if self._recorder.is_over:
            return getattr(self._value, name)(*args)
        if sys._getframe(1).f_code.co_filename.startswith((_TORCH, _PACKAGE)):
            return "a number"  # for a message of theirs
        self._recorder.look(self, "it is made a text")

    return text


def _round(x: Any, *digits: Any) -> Any:
    return round(x, *digits)


def _methods() -> dict[str, Any]:
    """What Python does with a number, for the stand-ins."""
    made: dict[str, Any] = {}
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor"):
        function = getattr(operator, f"{name}_" if name in ("and", "or") else name)
        made[f"__{name}__"] = _method(function)
        made[f"__r{name}__"] = _method(function, reflected=True)
    for name in ("neg", "pos", "abs", "invert"):
        made[f"__{name}__"] = _method(getattr(operator, name))
    for name in ("floor", "ceil", "trunc"):
        made[f"__{name}__"] = _method(getattr(math, name))
    made["__round__"] = _method(_round)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        made[f"__{name}__"] = _compared(f"__{name}__")
    for name in ("bool", "int", "float", "complex", "index"):
        made[f"__{name}__"] = _looking(f"its {name} is taken", f"__{name}__")
    for name in ("__str__", "__repr__", "__format__"):
        made[name] = _text(name)
    made["__hash__"] = _looking("it is a key", "__hash__")
    made["__reduce_ex__"] = _looking("it is pickled", "__reduce_ex__")
    for name in ("__divmod__", "__rdivmod__", "is_integer", "as_integer_ratio", "hex", "conjugate", "bit_length"):
        made[name] = _looking(f"{name} is asked of it", name)
    for name in ("bit_count", "to_bytes"):
        made[name] = _looking(f"{name} is asked of it", name)
    for name in ("real", "imag", "numerator", "denominator"):
        made[name] = _asked(name)
    made["__copy__"] = lambda self: self
    made["__deepcopy__"] = lambda self, memo: self
    return made


# `isinstance(sigma, float)` is to be what it is in eager; to PyTorch, which asks for the type itself, it is a symbol.
_Float: Any = type("_Float", (torch.SymFloat,), {**_methods(), "__class__": property(lambda self: float)})
_Int: Any = type("_Int", (torch.SymInt,), {**_methods(), "__class__": property(lambda self: int)})


# -- the graph --------------------------------------------------------------------------------------------------------


def is_stand_in(node: fx.Node) -> bool:
    """Whether a node of a trace is what stands in for a number there."""
    filled = node.args[0] if node.target in _ITEMS else None
    if not isinstance(filled, fx.Node) or filled.target is not _aten.full.default:
        return False
    mark = filled.args[1]
    return isinstance(mark, int | float) and _MARK <= mark < _MARK + _MOST


def bind(gm: fx.GraphModule, recorder: Recorder, leaves: Sequence[Any]) -> list[Expression]:
    """Have the graph of a trace take what stood in for numbers as inputs, after all others; returns what they are.

    ``leaves``: those of the call that was traced; nodes then carry its numbers under ``meta["val"]``. Raises
    :class:`NotCarried` where a number decides a size, or where PyTorch has computed with one by itself.
    """
    graph = gm.graph
    for ours, target in zip(_powers(), (_aten.pow.Tensor_Scalar, _aten.pow.Scalar), strict=True):
        for node in graph.find_nodes(op="call_function", target=ours):
            node.target = target
    if any(repr(x) != repr(leaves[p]) for p, x in recorder.given.items()):
        raise NotCarried(dict.fromkeys(recorder.positions, "torch.export gives the inputs another order"))
    if any(isinstance(m, fx.GraphModule) for name, m in gm.named_modules() if name):
        raise NotCarried(dict.fromkeys(recorder.positions, "the model has parts that torch.export keeps apart"))
    items: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if is_stand_in(node):
            items.setdefault(int(node.args[0].args[1]) - _MARK, []).append(node)
    bound: list[Expression] = []
    symbols: set[Any] = set()
    for k, nodes in sorted(items.items()):
        expression = recorder.expressions[k]
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            number = graph.placeholder(f"number_{k}")
        number.target = number.name  # an input of the model may have the name that was asked for
        number.meta["val"] = expression.of(leaves)
        for node in nodes:
            symbols |= node.meta["val"].node.expr.free_symbols
            filled = node.args[0]
            node.replace_all_uses_with(number)
            graph.erase_node(node)
            if not filled.users:  # type: ignore[union-attr]
                graph.erase_node(filled)  # type: ignore[arg-type]
        if not number.users:
            graph.erase_node(number)
            continue
        _fold_writes(graph, number)
        _check_uses(number, expression)
        bound.append(expression)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and _symbols(node.meta.get("val")) & symbols:
            graph.erase_node(node)
    left = next((n for n in graph.nodes if n.op != "output" and _symbols(n.meta.get("val")) & symbols), None)
    if left is not None:
        raise NotCarried(dict.fromkeys(recorder.positions, f"PyTorch computes with it ({left.target})"))
    gm.recompile()
    return bound


def _fold_writes(graph: fx.Graph, number: fx.Node) -> None:
    """Have ``x[0] = sigma`` write a number. Where it is known PyTorch does that too, or copies a tensor of it."""
    for made in [n for n in number.users if n.target is _aten.scalar_tensor.default]:
        for user in list(made.users):
            if user.target is not _aten.copy.default or user.args[1] is not made:
                continue
            x, value = user.args[0].meta["val"], made.meta["val"]  # type: ignore[union-attr]
            if x.dtype is value.dtype and value.device in (torch.device("cpu"), x.device):
                user.target, user.args, user.kwargs = _aten.fill.Scalar, (user.args[0], number), {}
        if not made.users:
            graph.erase_node(made)


def _check_uses(number: fx.Node, expression: Expression) -> None:
    for user in number.users:
        if not isinstance(user.target, torch._ops.OpOverload):
            raise NotCarried(dict.fromkeys(expression.positions(), "it decides a size or a place"))
        for i, declared in enumerate(user.target._schema.arguments):
            given = user.args[i] if i < len(user.args) else user.kwargs.get(declared.name)
            if number in (given if isinstance(given, list | tuple) else (given,)) and "int" in str(declared.type):
                raise NotCarried(
                    dict.fromkeys(expression.positions(), f"{user.target} takes it as {declared.name}, a size or place")
                )


def _symbols(value: Any) -> set[Any]:
    """PyTorch's symbols in a value, or in how it lies in memory."""
    found: set[Any] = set()
    for x in pytree.tree_leaves(value):
        is_strided = isinstance(x, torch.Tensor) and x.layout is torch.strided
        for n in (*x.shape, *x.stride(), x.storage_offset()) if is_strided else (x,):
            if isinstance(n, torch.SymInt | torch.SymFloat | torch.SymBool):
                found |= n.node.expr.free_symbols
    return found


# -- the proof --------------------------------------------------------------------------------------------------------


def same_computation(made: Any, reference: Any, leaves: Sequence[Any]) -> bool:
    """Whether a program that takes numbers computes what ``reference`` does, which has those of ``leaves`` written in.

    A model may have asked for the type of a number, which a stand-in cannot hide. What the reference computed of
    numbers while it was compiled (``torch.tensor(sigma)``) is compared by value.
    """
    if (
        made.structure != reference.structure
        or made.direct_only != reference.direct_only
        or made.data_dependent != reference.data_dependent
        or made.absolute != reference.absolute
        or made.reads_layout != reference.reads_layout
        or not _same_outputs(made.outputs, reference.outputs)
    ):
        return False
    values = [x.expression.of(leaves) for x in made.numbers.inputs]
    return _Comparison(made, reference, values).is_same()


def _same_outputs(a: Sequence[Any], b: Sequence[Any]) -> bool:
    def plain(output: Any) -> Any:
        if hasattr(output, "weight"):  # handed back
            view = output.view.code if output.view is not None else None
            place = None if output.weight is None else (output.weight.data_ptr(), output.weight.shape)
            return output.position, place, view
        return repr(output)

    return len(a) == len(b) and all(type(x) is type(y) and plain(x) == plain(y) for x, y in zip(a, b, strict=True))


class _Unknown(Exception):
    """A node depends on inputs, or is too large to be looked at."""


class _Comparison:
    def __init__(self, made: Any, reference: Any, values: Sequence[Any]) -> None:
        self._names: dict[fx.Node, Any] = {}
        self._known: dict[fx.Node, Any] = {}
        self._same: dict[tuple[fx.Node, fx.Node], bool] = {}
        self._outputs = []
        for program, numbers in ((made, values), (reference, ())):
            graph = program.module.graph
            placeholders = graph.find_nodes(op="placeholder")
            n = len(program.weights)
            for node, name, tensor in zip(placeholders, program.weight_names, program.weights, strict=False):
                self._names[node] = name
                if tensor.numel() <= _MOST and ("lifted_tensor" in name or name.startswith("constant.")):
                    self._known[node] = tensor
            end = len(placeholders) - len(numbers)
            for i, node in enumerate(placeholders[n:end]):
                self._names[node] = i
            self._known.update(zip(placeholders[end:], numbers, strict=True))
            for node in graph.nodes:
                if node.op == "call_function" and node.all_input_nodes and self._is_closed(node):
                    self._known[node] = None  # computed where it is asked for
            self._outputs.append(graph.output_node().args[0])

    def _is_closed(self, node: fx.Node) -> bool:
        return isinstance(node.target, torch._ops.OpOverload) and all(
            n in self._known or (n.op == "call_function" and not n.all_input_nodes) for n in node.all_input_nodes
        )

    def is_same(self) -> bool:
        a, b = self._outputs
        return len(a) == len(b) and all(self._alike(x, y) for x, y in zip(a, b, strict=True))

    def _alike(self, a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            # Not by recursion alone: graphs are deep.
            stack = [(a, b)]
            while stack:
                pair = stack[-1]
                if pair in self._same:
                    stack.pop()
                    continue
                waiting = [p for p in _pairs(*pair) if p not in self._same]
                if waiting:
                    stack += waiting
                    continue
                self._same[pair] = self._alike_nodes(*stack.pop())
            return self._same[a, b]
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            return self._alike_values(a, b)
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return len(a) == len(b) and all(self._alike(x, y) for x, y in zip(a, b, strict=True))
        return type(a) is type(b) and repr(a) == repr(b)

    def _alike_nodes(self, a: fx.Node, b: fx.Node) -> bool:
        if a.op == b.op == "placeholder":
            if a in self._names and b in self._names and self._names[a] == self._names[b]:
                return a not in self._known or self._alike_values(a, b)
        elif a.op == b.op == "call_function" and a.target is b.target and a.kwargs.keys() == b.kwargs.keys():
            if a.target is _aten.fill.Scalar and self._alike(a.args[0], b.args[0]):
                return self._alike_values(self._written(a), self._written(b))
            pairs = [(a.args, b.args), *((a.kwargs[k], b.kwargs[k]) for k in a.kwargs)]
            if all(self._alike(x, y) for x, y in pairs):
                return True
        elif (a.target, b.target) == (_aten.fill.Scalar, _aten.copy.default) and self._alike(a.args[0], b.args[0]):
            return self._alike_values(self._written(a), self._written(b))
        return self._alike_values(a, b)

    def _written(self, node: fx.Node) -> torch.Tensor | None:
        """The one value that ``fill`` or ``copy`` writes everywhere; None if it is not known, or not one."""
        try:
            value = self._value(node.args[1])
        except Exception:
            return None
        if isinstance(value, torch.Tensor) and value.dim():
            return None
        # What is known may have been rounded to the type already.
        return torch.as_tensor(value, dtype=node.meta["val"].dtype)

    def _alike_values(self, a: Any, b: Any) -> bool:
        try:
            x, y = self._value(a), self._value(b)
        except Exception:
            return False
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return (
                x.shape == y.shape
                and x.dtype is y.dtype
                and torch.equal(x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8))
            )
        return type(x) is type(y) and type(x) in (int, float) and repr(x) == repr(y)

    def _value(self, x: Any) -> Any:
        """On the CPU."""
        if not isinstance(x, fx.Node):
            return x
        if self._known.get(x) is None:
            value = x.meta["val"]
            if not isinstance(x.target, torch._ops.OpOverload) or value.numel() > _MOST or is_random(x):
                raise _Unknown
            if x.all_input_nodes and x not in self._known:
                raise _Unknown

            def of(y: Any) -> Any:
                if isinstance(y, fx.Node):
                    return self._value(y)
                return torch.device("cpu") if isinstance(y, torch.device) else y

            args, kwargs = fx.node.map_aggregate((x.args, x.kwargs), of)
            with torch.no_grad():
                self._known[x] = x.target(*args, **kwargs)
        found = self._known[x]
        return found.cpu() if isinstance(found, torch.Tensor) else found


def _pairs(a: fx.Node, b: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Inputs of two nodes that stand at the same places."""
    x, y = a.all_input_nodes, b.all_input_nodes
    return list(zip(x, y, strict=True)) if a.target is b.target and len(x) == len(y) else []

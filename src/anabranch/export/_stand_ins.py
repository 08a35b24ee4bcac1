"""Stand-ins for numbers of a call, while a model is traced.

``torch.export`` writes a Python number into the graph as the value that it has. For a number that varies from call to
call the model is traced with a stand-in: an object that PyTorch takes for a number without a known value, and that
notes what Python computes of it. Whatever else looks at its value (a branch, ``float(x)``, ``math.sqrt(x)``, a size, a
key, a text) is noted and raises :class:`NotCarried`: then the value stays a part of the signature.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from anabranch.export import _operators
from anabranch.export._diagnosis import line_on
from anabranch.export._numbers import Expression, NotCarried
from anabranch.export._operators import NAMESPACE
from anabranch.export._tree import unflatten

_aten = torch.ops.aten
_TORCH = str(Path(torch.__file__).parent)
_PACKAGE = str(Path(__file__).parents[1])
#: The stand-in of expression ``k`` is the item of a tensor that is filled with this and ``k``: no model has it.
_MARK = (1 << 52) + 7_654_321
_ITEMS = (_aten.item.default, _aten._local_scalar_dense.default)
#: Stand-ins of one trace.
_MOST = 1 << 16


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
        return unflatten(leaves, structure)

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
    line = line_on(sys._getframe(2))
    return f" ({line})" if line else ""


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

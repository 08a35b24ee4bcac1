"""What a compiler's wrapper does in a call, as a flat list of steps: for the C++ to run it without Python.

Inductor writes a function in Python that allocates, launches kernels and calls operators, with sizes computed from
those of the inputs. The function is run once here, in a copy of its module's names, on stand-ins that note what is
done with them. What is not known here is an error, and the wrapper stays with Python.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from anabranch.runtime._flat import (
    NUMBER_TYPES,
    Argument,
    Call,
    CompiledKernel,
    Empty,
    Expect,
    FlatProgram,
    Launch,
    Number,
    Pick,
    View,
)

#: Threads of a warp, of which kernels have a number.
_WARP = 32


class _Unknown(Exception):
    """The wrapper does what is not known here."""


def follow(call: Callable[[list[Any]], Any], inputs: int, device: torch.device) -> FlatProgram | str:
    """What ``call``, a wrapper of Inductor's, does with so many tensors on ``device``; or why that is not known."""
    try:
        return _Following(inputs, device).follow(call)
    except _Unknown as e:
        return str(e)
    except Exception as e:  # stand-ins are not what code that is not known here expects
        return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


class _Tensor:
    """Stands for a tensor in a slot."""

    def __init__(self, following: _Following, slot: int) -> None:
        self._following, self.slot = following, slot

    def size(self) -> _Shape:
        return _Shape(self._following, self.slot, "size")

    def stride(self) -> _Shape:
        return _Shape(self._following, self.slot, "stride")


class _Shape:
    """Sizes or strides of a tensor."""

    def __init__(self, following: _Following, slot: int, name: str) -> None:
        self._following, self._slot, self._name = following, slot, name

    def __getitem__(self, d: int) -> _Number:
        return self._following.number(self._name, [("slot", self._slot), ("constant", d)])


class _List:
    """Stands for a list of tensors that is an operator's one result."""

    def __init__(self, following: _Following, slot: int) -> None:
        self._following, self._slot = following, slot

    def __getitem__(self, position: int) -> _Tensor:
        if position < 0:
            raise _Unknown("a result is counted from the end")
        self._following.made.steps.append(Pick(self._slot, position))
        return _Tensor(self._following, self._following.fill())


class _Number:
    """Stands for a number in a slot. What has to know its value is an error."""

    def __init__(self, following: _Following, slot: int) -> None:
        self._following, self.slot = following, slot

    def __bool__(self) -> bool:
        raise _Unknown("the wrapper asks for the value of a size")

    __index__ = __int__ = __float__ = __bool__

    def _with(self, name: str, *others: Any, reverse: bool = False) -> _Number:
        given = [self, *others]
        return self._following.number(name, [self._following.plain(x) for x in (given[::-1] if reverse else given)])

    def __add__(self, other: Any) -> _Number:
        return self._with("add", other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> _Number:
        return self._with("sub", other)

    def __rsub__(self, other: Any) -> _Number:
        return self._with("sub", other, reverse=True)

    def __mul__(self, other: Any) -> _Number:
        return self._with("mul", other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> _Number:
        return self._with("floordiv", other)

    def __rfloordiv__(self, other: Any) -> _Number:
        return self._with("floordiv", other, reverse=True)

    def __mod__(self, other: Any) -> _Number:
        return self._with("mod", other)

    def __pow__(self, other: Any) -> _Number:
        return self._with("pow", other)

    def __neg__(self) -> _Number:
        return self._with("neg")

    # As steps too, and not as of objects: what they are asked for is a value.
    def __eq__(self, other: Any) -> _Number:  # type: ignore[override]
        return self._with("eq", other)

    def __ne__(self, other: Any) -> _Number:  # type: ignore[override]
        return self._with("ne", other)

    def __lt__(self, other: Any) -> _Number:
        return self._with("lt", other)

    def __le__(self, other: Any) -> _Number:
        return self._with("le", other)

    def __gt__(self, other: Any) -> _Number:
        return self._with("gt", other)

    def __ge__(self, other: Any) -> _Number:
        return self._with("ge", other)

    __hash__ = None  # type: ignore[assignment]


class _Names:
    """Stands for a module or a namespace: what is asked of it is asked of ``find``."""

    def __init__(self, find: Callable[[str], Any]) -> None:
        self._find = find

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._find(name)


class _Kernel:
    """Stands for a kernel of Triton's."""

    def __init__(self, following: _Following, tuner: Any) -> None:
        self._following, self._tuner = following, tuner

    def run(self, *args: Any, stream: Any, **options: Any) -> None:
        if len(self._tuner.launchers) != 1 or options:
            raise _Unknown("a kernel's variant is not chosen yet")
        (launcher,) = self._tuner.launchers
        run = launcher.__globals__.get("runner")
        kernel: Any = getattr(run, "__self__", None)
        if not isinstance(getattr(kernel, "function", None), int):
            raise _Unknown("a kernel is launched by code that is not known here")
        nulls = sum(bool(getattr(kernel, name, False)) for name in ("has_global_scratch", "has_profile_scratch"))
        compiled = CompiledKernel(
            kernel.function, _WARP * kernel.num_warps, kernel.shared, kernel.arg_tys + "O" * nulls
        )

        def note(x: Any, y: Any, z: Any, stream: Any, *given: Any) -> None:
            self._following.launch(compiled, [x, y, z], [*given, *[None] * nulls])

        # What it computes its grid by is the launcher's own code.
        names = {**launcher.__globals__, "runner": note, **self._following.numbers}
        types.FunctionType(launcher.__code__, names, argdefs=launcher.__defaults__)(*args, stream=stream)


class _Following:
    """One run of a wrapper on stand-ins."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.made = FlatProgram(inputs)
        self._end = inputs
        self._device = device
        #: Each number is computed once.
        self._computed: dict[Any, _Number] = {}
        #: Functions of numbers, by the names that the code has for them.
        self.numbers: dict[str, Any] = {
            name: lambda *given, name=name: self.number(name, [self.plain(x) for x in given]) for name in ("max", "min")
        }

    def follow(self, call: Callable[[list[Any]], Any]) -> FlatProgram:
        function: Any = getattr(call, "__func__", call)
        names = {**function.__globals__, **self.numbers, **self._known()}
        for name, value in function.__globals__.items():
            if hasattr(value, "launchers") and hasattr(value, "run"):
                names[name] = _Kernel(self, value)
        copy = types.FunctionType(function.__code__, names, argdefs=function.__defaults__)
        tensors: list[Any] = [_Tensor(self, i) for i in range(self.made.inputs)]
        own = [None] if function is not call else []  # a method does nothing with its object
        for result in copy(*own, tensors):
            if not isinstance(result, _Tensor):
                raise _Unknown("a result is no tensor")
            self.made.results.append(result.slot)
        return self.made

    def _known(self) -> dict[str, Any]:
        """Stand-ins for what wrappers use, by the names that they have for it."""
        known: dict[str, Any] = {"empty_strided_" + self._device.type: self._empty, "reinterpret_tensor": self._view}
        known["assert_size_stride"] = self._expect
        # The allocator's blocks are aligned, and so is what begins with one.
        known["assert_alignment"] = lambda *_: None
        known["get_raw_stream"] = lambda index: None
        known["extern_kernels"] = _Names(self._extern)
        operators = _Names(lambda space: self._space(getattr(torch.ops, space)))
        known["aten"] = self._space(torch.ops.aten)
        spaces = {"ops": operators, self._device.type: _Names(_guard)}
        known["torch"] = _Names(lambda name: spaces[name] if name in spaces else _plain(name))
        return known

    def fill(self, count: int = 1) -> int:
        first = self._end
        self._end += count
        return first

    def number(self, name: str, arguments: list[Argument]) -> _Number:
        known = name, *arguments
        if known not in self._computed:
            self._computed[known] = self._compute(name, arguments)
        return self._computed[known]

    def _compute(self, name: str, arguments: list[Argument]) -> _Number:
        self.made.steps.append(Number(name, arguments))
        slot = self.fill()
        self.made.numbers.add(slot)
        return _Number(self, slot)

    def plain(self, value: Any) -> Argument:
        """A number."""
        if isinstance(value, _Number):
            return "number", value.slot
        if isinstance(value, int | float):
            return "constant", value
        raise _Unknown(f"{type(value).__name__} given; a number was expected")

    def _argument(self, value: Any) -> Argument:
        if isinstance(value, _Tensor):
            return "slot", value.slot
        if isinstance(value, list | tuple) and any(isinstance(x, _Tensor | _Number | list | tuple) for x in value):
            return "list", [self._argument(x) for x in value]
        if isinstance(value, _Number):
            return "number", value.slot
        if isinstance(value, _List | _Shape | _Names):
            raise _Unknown("an operator is given what is not known here")
        return "constant", value

    def _tensor(self, value: Any) -> Argument:
        if not isinstance(value, _Tensor):
            raise _Unknown(f"{type(value).__name__} given; a tensor was expected")
        return "slot", value.slot

    def _empty(self, sizes: Sequence[Any], strides: Sequence[Any], dtype: torch.dtype) -> _Tensor:
        self.made.steps.append(Empty([*map(self.plain, sizes)], [*map(self.plain, strides)], dtype))
        return _Tensor(self, self.fill())

    def _view(self, base: Any, sizes: Sequence[Any], strides: Sequence[Any], offset: Any = 0) -> _Tensor:
        given = [*map(self.plain, sizes)], [*map(self.plain, strides)], self.plain(offset)
        self.made.steps.append(View(self._tensor(base), *given))
        return _Tensor(self, self.fill())

    def _expect(self, tensor: Any, sizes: Sequence[Any], strides: Sequence[Any], made_by: str = "") -> None:
        # Of inputs it is known: they are brought into this layout before.
        if made_by:
            given = [*map(self.plain, sizes)], [*map(self.plain, strides)]
            self.made.steps.append(Expect(self._tensor(tensor), *given, made_by))

    def launch(self, kernel: CompiledKernel, grid: Sequence[Any], given: Sequence[Any]) -> None:
        if len(given) != len(kernel.types):
            raise _Unknown(f"a kernel of {len(kernel.types)} parameters is given {len(given)}")
        arguments: list[Argument] = []
        for kind, value in zip(kernel.types, given, strict=True):
            if kind == "O":
                arguments.append(("constant", None) if value is None else self._tensor(value))
            else:
                arguments.append(self.plain(value))
        self.made.steps.append(Launch(kernel, [*map(self.plain, grid)], arguments))

    def _extern(self, name: str) -> Callable[..., Any]:
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            raise _Unknown(f"extern_kernels.{name} is not known here")

        def call(*args: Any, **kwargs: Any) -> Any:
            overloads = packet.overloads()
            overload = "out" if "out" in kwargs else "default"
            if overload not in overloads:
                raise _Unknown(f"extern_kernels.{name} is not known here")
            return self._call(getattr(packet, overload), args, kwargs)

        return call

    def _space(self, space: Any) -> _Names:
        """A namespace of operators."""

        def packet(name: str) -> _Names:
            return _Names(lambda overload: self._operator(getattr(getattr(space, name), overload)))

        return _Names(packet)

    def _operator(self, target: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._call(target, args, kwargs)

    def _call(self, target: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        schema = target._schema
        given = []
        for i, declared in enumerate(schema.arguments):
            if i < len(args) and not declared.kwarg_only:
                given.append(self._argument(args[i]))
            else:
                given.append(self._argument(kwargs.get(declared.name, declared.default_value)))
        known = {declared.name for declared in schema.arguments}
        if not known.issuperset(kwargs) or sum(not a.kwarg_only for a in schema.arguments) < len(args):
            raise _Unknown(f"{schema.name} is given what its schema does not have")
        kinds = [str(r.type) for r in schema.returns]
        is_list = kinds == ["List[Tensor]"]
        if not is_list and any(kind != "Tensor" and kind not in NUMBER_TYPES for kind in kinds):
            raise _Unknown(f"{schema.name} returns {', '.join(kinds)}")
        self.made.steps.append(Call(schema.name, schema.overload_name, given))
        if is_list:
            return _List(self, self.fill())
        first = self.fill(len(kinds))
        self.made.numbers.update(first + i for i, kind in enumerate(kinds) if kind in NUMBER_TYPES)
        made = tuple(
            _Number(self, first + i) if kind in NUMBER_TYPES else _Tensor(self, first + i)
            for i, kind in enumerate(kinds)
        )
        return made[0] if len(made) == 1 else made


def _guard(name: str) -> Callable[..., Any]:
    """Of ``torch.cuda``: the device is the current one anyway."""
    if name not in ("_DeviceGuard", "device", "set_device"):
        raise _Unknown(f"{name} of the device is not known here")
    return lambda *_: contextlib.nullcontext()


def _plain(name: str) -> Any:
    """What wrappers take from ``torch`` as it is: a dtype, a device, a layout."""
    value = getattr(torch, name)
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format) or value is torch.device:
        return value
    raise _Unknown(f"torch.{name} is not known here")

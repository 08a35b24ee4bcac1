"""The model as ``torch.export`` sees it, and what is seen of the model while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from anabranch.export import _rotary
from anabranch.export._assignments import Assignments
from anabranch.export._isolation import Traced
from anabranch.export._layout import LayoutWatch
from anabranch.export._leaks import Watch
from anabranch.export._outputs import Returned
from anabranch.export._precision import HalfPrecision
from anabranch.export._signature import TensorSpec
from anabranch.export._spellings import Spellings
from anabranch.export._stand_ins import Recorder, TakesNumbers
from anabranch.export._tree import Contents, map_tensors, unflatten
from anabranch.export._writes import Writes

#: Stands for a tensor. The tensors themselves would live for as long as what export leaves behind.
TENSOR = object()


class Seen:
    """What was seen while the model ran. No attributes of the module: torch.export puts those back as they were."""

    #: What the model returned.
    returned: Returned
    #: Whether it looked at how its inputs lie in memory.
    reads_layout = False
    #: The stand-ins for tensors that it computed with.
    watch: Watch | None = None
    #: What it did with the numbers that are inputs.
    recorder: Recorder | None = None
    #: Whether it changed a list or a dict that it was given.
    changes_containers = False
    #: What it assigned to attributes. None: it was not traced.
    assignments: Assignments | None = None
    #: What it writes.
    writes: Writes | None = None

    def __init__(self) -> None:
        #: Where tensors lie that require a gradient and are no parameters of the model: torch.export forgets it.
        self.requires_grad: set[Any] = set()


class _GradientWatch(TorchFunctionMode):
    """While it is on, notes which tensors of operators require a gradient."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            for x in (*args, *kwargs.values()):
                if type(x) in (torch.Tensor, torch.nn.Parameter) and x.requires_grad:
                    self._seen.requires_grad |= {place(x)} - {None}
        return func(*args, **kwargs)


def place(x: torch.Tensor) -> Any:
    """None for what is no dense tensor."""
    try:
        return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype
    except (NotImplementedError, RuntimeError):
        return None


class Forward(torch.nn.Module):
    """The model as ``torch.export`` sees it: plain tensors in memory go in, tensors in a flat tuple come out.

    Lazy bits are put on its inputs here, and precision is changed at the border.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        specs: Sequence[TensorSpec],
        precision: torch.dtype | None = None,
        dtypes: Sequence[Any] = (),
        *,
        numbers: frozenset[int] = frozenset(),
        rest: tuple[Sequence[Any], pytree.TreeSpec] | None = None,
    ) -> None:
        """``rest``: it is given the tensors alone, one after another; all leaves of a call, with :data:`TENSOR` in the
        place of each tensor, and their structure."""
        super().__init__()
        self.model = model
        self.seen = Seen()
        if numbers:
            self.seen.recorder = Recorder(numbers)
        self._specs = specs
        self._precision = precision
        self._dtypes = dtypes
        self._rest = rest

    def around(self, model: torch.nn.Module) -> Forward:
        """The same for another copy of the model, to run and not to trace."""
        return Forward(model, self._specs, self._precision, self._dtypes)

    def in_eager(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        """What it returns when the model is called as users do, under no modes: layers have fast paths that they do not
        take under any. In half precision there is one all the same."""
        if self._precision is not None:
            values: Sequence[Any] = self(*args, **kwargs)
            return values
        args, kwargs = self._as_given(args, kwargs)
        self.seen.returned, values = Returned.of(self.model(*args, **kwargs))
        return values

    def _as_given(self, args: Any, kwargs: Any) -> Any:
        """What lies in memory of arguments, with the lazy bits on it that they are given with."""
        if not any(spec.is_lazy for spec in self._specs):
            return args, kwargs
        specs = iter(self._specs)
        return map_tensors(lambda x: next(specs).in_memory(x), (args, kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._rest is not None:
            tensors, (leaves, structure) = iter(args), self._rest
            whole = [next(tensors) if x is TENSOR else x for x in leaves]
            args, kwargs = unflatten(whole, structure)
        self.seen.watch = Watch(pytree.tree_leaves((args, kwargs)))
        args, kwargs = self._as_given(args, kwargs)
        assignments = Assignments(self.model, pytree.tree_leaves((args, kwargs)))
        spellings: AbstractContextManager[Any] = nullcontext()
        apart: AbstractContextManager[Any] = nullcontext()
        if is_traced():
            self.seen.assignments, spellings, apart = assignments, Spellings(assignments), Traced()
        watch = LayoutWatch(pytree.tree_leaves((args, kwargs)))
        if self.seen.recorder is not None:
            args, kwargs = self.seen.recorder.enter((args, kwargs))
        if self._precision is None:
            with apart, watch, _GradientWatch(self.seen), spellings:
                result = self._call_model(args, kwargs)
            return tuple(self._note(result, watch))

        originals: dict[int, torch.Tensor] = {}

        def enter(x: torch.Tensor) -> torch.Tensor:
            if not x.is_floating_point() or x.dtype is self._precision:
                return x
            cast = x.to(self._precision)
            originals[id(cast)] = x
            return cast

        args, kwargs = map_tensors(enter, (args, kwargs))
        with apart, watch, _GradientWatch(self.seen), HalfPrecision(self._precision), spellings:
            result = self._call_model(args, kwargs)
        if self.seen.assignments is None:
            assignments.keep_types()
        # An input that is handed back is the caller's own, not a rounded copy.
        result = map_tensors(lambda y: originals.get(id(y), y), result)
        return tuple(
            x.to(d) if isinstance(x, torch.Tensor) and d else x
            for x, d in zip(self._note(result, watch), self._dtypes, strict=True)
        )

    def _call_model(self, args: Any, kwargs: Any) -> Any:
        contents = Contents((args, kwargs))
        result = self._call_with_numbers(args, kwargs)
        self.seen.changes_containers = contents.changed()
        return result

    def _call_with_numbers(self, args: Any, kwargs: Any) -> Any:
        recorder = self.seen.recorder
        if recorder is None:
            with _rotary.without_questions(self.model):
                return self.model(*args, **kwargs)
        try:
            with TakesNumbers(), _rotary.without_questions(self.model):
                result = self.model(*args, **kwargs)
            recorder.check()
            recorder.check_result(result)
        except Exception as e:
            recorder.check(e)
            raise
        return result

    def _note(self, result: Any, watch: LayoutWatch) -> list[Any]:
        self.seen.returned, values = Returned.of(result)
        self.seen.reads_layout = watch.was_read
        assignments = self.seen.assignments
        if assignments is None:
            return values
        values = assignments.settle(values, self._precision is not None)
        self.seen.returned.refusal = self.seen.returned.refusal or assignments.refusal or None
        return values


def is_traced() -> bool:
    """Whether operators of this thread are being recorded."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None

"""What keeps the model as it is while ``compile`` runs it: copies of its memory, and what is not let near the memory.

Other threads may use the model meanwhile, so nothing of it is written and then put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from anabranch.export._assignments import storage as place
from anabranch.export._diagnosis import copy_of
from anabranch.export._snapshot import Snapshot, alias, lying_in
from anabranch.export._tree import map_tensors

#: By these the memory of a tensor gets to where no operator is needed to write it.
_HAND_OUT = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__)
_REAL = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Copies:
    """Stand-ins for tensors: copies in memory of their own. What lies in one storage does so among the copies."""

    def __init__(self) -> None:
        self._made: dict[int, torch.UntypedStorage] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """As :func:`alias`, in other memory."""
        with torch.inference_mode(False), torch.no_grad():
            made = alias(x)
            if place(made) is None or made.is_quantized or type(made) is not torch.Tensor:
                try:
                    return made.clone()
                except (NotImplementedError, RuntimeError):  # of a class that has no such operator
                    return made
            storage = x.untyped_storage()
            if storage._cdata not in self._made:
                whole = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
                self._made[storage._cdata] = whole.clone().untyped_storage()
            return lying_in(self._made[storage._cdata], x)


#: What runs a copy of a model: that itself, or something around it.
_Around = Callable[[torch.nn.Module], Callable[..., Any]]
_Made = Callable[[torch.Tensor], torch.Tensor]


def run_in_eager(
    snapshot: Snapshot, args: Sequence[Any], kwargs: Mapping[str, Any], around: _Around = lambda model: model
) -> Exception | None:
    """Run the model as it is, on copies of these inputs and of all that it holds; returns what it raises, if anything.

    On a device with streams it runs on zeros on the CPU: nothing is queued there.
    """
    given = *pytree.tree_leaves((args, kwargs)), *snapshot.module.parameters()
    if any(x.device.type not in ("cpu", "meta") for x in given if isinstance(x, torch.Tensor)):
        return run_on_zeros(snapshot, args, kwargs, around)
    try:
        with torch.random.fork_rng(()):
            try:
                with torch.no_grad():
                    _run(around(snapshot.fresh(Copies()).module), args, kwargs, copy_of)
            except Exception:
                # A model that takes derivatives runs in no other way.
                with torch.enable_grad():
                    _run(around(snapshot.fresh(Copies()).module), args, kwargs, copy_of)
    except Exception as e:
        return e
    return None


def run_on_zeros(
    snapshot: Snapshot, args: Sequence[Any], kwargs: Mapping[str, Any], around: _Around = lambda model: model
) -> Exception | None:
    """Run the model on the CPU, with zeros for all tensors that it holds and for its inputs; returns what it raises.

    Kernels refuse mixed types that fake tensors let pass. What the CPU alone cannot do counts as nothing.
    """

    def zeros(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape, dtype=x.dtype)

    try:
        with torch.random.fork_rng(()), torch.no_grad():
            _run(around(snapshot.fresh(zeros).module), args, kwargs, zeros)
    except Exception as e:
        of_the_cpu = isinstance(e, NotImplementedError) or any(w in str(e) for w in ("not implemented", "device"))
        return None if of_the_cpu else e
    return None


def _run(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], made: _Made) -> None:
    """``made``: what stands for an input."""
    given, named = map_tensors(made, (tuple(args), dict(kwargs)))
    model(*given, **named)


class Withheld(TorchFunctionMode):
    """While it is on, who asks for the memory of a tensor that the model holds, as NumPy does, gets that of a copy."""

    def __init__(self, is_held: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self._is_held = is_held
        self._handed_out: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HAND_OUT and self._is_held(args[0]):
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                copy = copy_of(args[0].detach())
            self._handed_out.append((args[0], copy))
            args = (copy, *args[1:])
        return func(*args, **(kwargs or {}))

    def written(self) -> list[torch.Tensor]:
        """The tensors whose copies were written."""
        return [x for x, copy in self._handed_out if not torch.equal(x.detach(), copy)]


class Traced(Withheld):
    """While it is on, no operator of a trace writes a real tensor, which is one that the model holds.

    Where all that an operator is given is real tensors and numbers, PyTorch computes with the values: in place, too.
    """

    def __init__(self) -> None:
        super().__init__(_is_real)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # the branches of torch.cond: Dynamo looks into no function from here
            return func(*args, **kwargs)
        found = [x for x in pytree.tree_leaves((args, kwargs)) if _is_real(x)] if _writes(func, kwargs) else []
        if not found:
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunction():
            held = _on_copies(found)
        try:
            return func(*args, **kwargs)
        finally:
            with torch._C.DisableTorchFunction():
                for x, own in held:
                    x.data = own


def _on_copies(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Put these tensors into memory of their own; returns each with what it was."""
    mode: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    held = []
    for x in {id(x): x for x in tensors}.values():
        if isinstance(mode, FakeTensorMode):
            mode.fake_tensor_converter.from_real_tensor(mode, x)  # kept: it is known by the memory that it has now
        with _disable_current_modes(), torch.no_grad():
            held.append((x, x.detach()))
            x.data = copy_of(x)
    return held


def _is_real(x: Any) -> bool:
    # What transforms of torch.func wrap has the plain type, too, and no memory that could be another.
    return type(x) in _REAL and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _writes(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of PyTorch's writes into what it is given, by its name."""
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    in_place = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return in_place or kwargs.get("out") is not None

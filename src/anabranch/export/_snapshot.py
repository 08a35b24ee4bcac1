"""A model as it was at compile: a copy with tensors of its own over the same memory.

``torch.export`` puts stand-ins in the place of a module's parameters for as long as it traces, and the module's code
may change its attributes. Both happen to a copy, so other threads may call the user's module meanwhile, and what the
user does to the module later (``train()``, ``half()``, a replaced weight) does not reach the engine. What is written
*into* the tensors does: the memory is shared.
"""

from __future__ import annotations

import collections
import copy
import copyreg
import enum
import functools
import io
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from anabranch.errors import UnsupportedModel
from anabranch.export._classes import derived, global_names, is_handle, variables_with_tensors, works_with_threads
from anabranch.export._diagnosis import check_parts
from anabranch.export._hooks import HOOKS
from anabranch.export._recurrent import keep_weights_in_place

#: Copied as they are: nothing in them can change, or they stand for something that there is once.
_SHARED: tuple[type, ...] = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type(...), type(NotImplemented), object),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.finfo, torch.iinfo),
    *(types.ModuleType, types.CodeType, types.GeneratorType, types.FrameType, property, staticmethod, classmethod),
)
_SHARED_IF_DERIVED = (type, enum.Enum, io.IOBase, threading.Thread, torch.Generator, torch.jit.ScriptModule)
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_METHODS_IN_C = (types.BuiltinMethodType, types.MethodWrapperType)


class Snapshot:
    """What a model was when this was made.

    ``module`` is never run. Immutable; threads: any.
    """

    def __init__(self, module: torch.nn.Module, originals: dict[int, weakref.ref[torch.Tensor]]) -> None:
        self.module = module
        self._originals = originals

    @classmethod
    def of(cls, model: torch.nn.Module | ExportedProgram, *, values: bool = True) -> Snapshot:
        """A snapshot of ``model``. Other threads may call the model meanwhile; none may change it.

        ``values=False``: its weights may be FakeTensors, which have none; enough for a graph.

        Raises :class:`UnsupportedModel` where a part of the model cannot be had twice.
        """
        module = model.module() if isinstance(model, ExportedProgram) else model
        check_parts(module, values=values)
        copier = Copier()
        copied: torch.nn.Module = copier(module)
        return cls(copied, {id(new): weakref.ref(old) for old, new in copier.tensors if new is not old})

    def fresh(self, made: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Fresh:
        """A copy of the module, to run and to trace. ``made``: what stands in it for a tensor, in other memory."""
        copier = Copier(made=made or alias)
        module = copier(self.module)
        keep_weights_in_place(module)
        return Fresh(module, self, copier.tensors, copier.generators)

    def replacing(self, parameters: Mapping[int, torch.nn.Parameter]) -> Snapshot:
        """Another snapshot, with other parameters in the place of those with these ids."""
        copier = Copier(parameters)
        module = copier(self.module)
        kept = {id(new): self._originals[id(old)] for old, new in copier.tensors if id(old) in self._originals}
        return Snapshot(module, kept)

    def original(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor | None] | None:
        """For a tensor of ``module``: what returns the user's own as long as that lives."""
        return self._originals.get(id(tensor))


class Fresh:
    """A copy of a snapshot's module."""

    def __init__(
        self,
        module: torch.nn.Module,
        snapshot: Snapshot,
        tensors: list[tuple[torch.Tensor, torch.Tensor]],
        generators: list[Any],
    ) -> None:
        """``tensors``: of the snapshot, each with its copy."""
        self.module, self.snapshot = module, snapshot
        #: The model's buffers as they were at compile, by name, whatever a call of the copy has put in their place.
        self.buffers = dict(snapshot.module.named_buffers(remove_duplicate=False))
        #: NumPy's random generators that the model holds. They are the user's own.
        self.generators = generators
        #: By id of a tensor of the copy: the snapshot's that it stands for.
        self.sources = {id(new): old for old, new in tensors}
        self.tensors = tensors  # they keep their ids
        self._originals = snapshot._originals

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        """The snapshot's tensor that one of the copy stands for; itself if it stands for none."""
        return self.sources.get(id(tensor), tensor)

    def original(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor | None] | None:
        """As :meth:`Snapshot.original`, for a tensor of the copy or of the snapshot."""
        return self._originals.get(id(self.source(tensor)))


def alias(x: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor of its own over the memory of ``x``: no history, no inference mode.

    Later changes of ``x.data``, which ``half()`` makes, do not reach it.
    """
    with torch.inference_mode(False), torch.no_grad():
        if not x.is_inference() or x.layout is not torch.strided:
            return x.detach()
        return lying_in(x.untyped_storage(), x)  # detach() would make another inference tensor


def lying_in(storage: torch.UntypedStorage, x: torch.Tensor) -> torch.Tensor:
    """A tensor that lies in ``storage`` as ``x`` does in its own."""
    made = torch.empty(0, dtype=x.dtype, device=x.device)
    made.set_(storage, x.storage_offset(), x.size(), x.stride())
    if x.is_conj():
        made = made.conj()
    return torch._neg_view(made) if x.is_neg() else made


class Copier:
    """Copies what a model consists of, each object once, so that what is the same in the model is so in the copy."""

    def __init__(
        self,
        parameters: Mapping[int, torch.nn.Parameter] | None = None,
        made: Callable[[torch.Tensor], torch.Tensor] = alias,
    ) -> None:
        """``parameters``: what to take in the place of objects with these ids; ``made``: in that of a tensor."""
        self._alias = made
        #: By id: the object, which keeps the id its own, and its copy.
        self._made: dict[int, tuple[Any, Any]] = {i: (None, p) for i, p in (parameters or {}).items()}
        self.tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.generators: list[Any] = []
        self.torch_generators: list[torch.Generator] = []
        #: Whether functions get global variables of their own: in hooks.
        self._isolated = False
        #: Of modules: their copies'. Their own, where a class and what is around its methods hold no tensors.
        self._classes: dict[type, type] = {}
        self._globals: dict[int, dict[str, Any]] = {}

    def __call__(self, x: Any) -> Any:
        try:
            return self._copy(x)
        except RecursionError as e:
            raise UnsupportedModel(
                f"the model ({type(x).__name__}) holds objects that are nested too deep to be copied; expected fewer"
                " than a few hundred levels. Move what forward() does not use out of the model."
            ) from e

    def _copy(self, x: Any) -> Any:
        kind = type(x)
        if kind in _SHARED:
            return x
        known = self._made.get(id(x))
        if known is not None:
            return known[1]
        if isinstance(x, torch.Tensor) and kind not in weakref.ProxyTypes:
            return self._tensor(x)
        if isinstance(x, _SHARED_IF_DERIVED) and kind not in weakref.ProxyTypes:
            if isinstance(x, torch.Generator):
                self.torch_generators.append(x)
            return x
        if isinstance(x, torch.nn.Module) and kind not in weakref.ProxyTypes:
            return self._module(x)
        make = self._MAKERS.get(kind)
        if make is not None:
            return make(self, x)
        if kind in _LOCKS:
            # A thread that holds the model's lock may be waiting for this very build.
            return self._done(x, threading.Lock() if kind is _LOCKS[0] else threading.RLock())
        if kind in _METHODS_IN_C:
            owner = self._copy(x.__self__)
            return x if owner is x.__self__ else self._done(x, getattr(owner, x.__name__))
        return self._object(x)

    def _done(self, x: Any, made: Any) -> Any:
        self._made[id(x)] = (x, made)
        return made

    # -- tensors and modules ------------------------------------------------------------------------------------

    def _tensor(self, x: torch.Tensor) -> torch.Tensor:
        from torch._subclasses.fake_tensor import FakeTensor

        if isinstance(x, FakeTensor):
            return self._done(x, x)
        made = self._alias(x)
        if isinstance(x, torch.nn.Parameter):
            needs_grad = x.requires_grad and (made.is_floating_point() or made.is_complex())
            if type(x) is torch.nn.Parameter or type(made) is not torch.Tensor:
                made = torch.nn.Parameter(made, needs_grad)
            else:
                made = torch.Tensor._make_subclass(type(x), made, needs_grad)
        self._done(x, made)
        self.tensors.append((x, made))
        for name, value in list(getattr(x, "__dict__", {}).items()):
            if name not in made.__dict__:
                made.__dict__[name] = self._copy(value)
        return made

    def _module(self, x: torch.nn.Module) -> Any:
        if type(x).__module__ == "torch._dynamo.eval_frame" and "_orig_mod" in x._modules:
            return self._done(x, self._copy(x._modules["_orig_mod"]))  # what torch.compile() was given
        kind = type(x)
        # Some classes are made for one module and changed with it: recompile() changes the forward() of a graph's, and
        # remove_parametrizations() takes a property away. The copy gets a class of its own.
        own = {k: v for k, v in kind.__dict__.items() if k not in ("__dict__", "__weakref__")}
        if isinstance(x, fx.GraphModule):
            kind = type(kind.__name__, (kind,), own)  # derived: its __call__ names the class
            self._done(x.graph, x.graph)  # what runs is the class's forward()
        elif parametrize.is_parametrized(x):
            kind = type(kind.__name__, kind.__bases__, own)
        else:
            kind = self._class(kind)
            if id(x) in self._made:  # a variable of the class leads to it
                return self._made[id(x)][1]
        made = self._done(x, object.__new__(kind))
        for name, value in list(x.__dict__.items()):
            made.__dict__[name] = self._hooks(value) if name in HOOKS else self._copy(value)
        self._slots(x, made)
        return made

    def _class(self, kind: type) -> type:
        if kind not in self._classes:
            variables = variables_with_tensors(kind)
            own = self._classes[kind] = derived(kind) if variables else kind
            for name, value in variables.items() if own is not kind else ():
                setattr(own, name, self._copy(value))
        return self._classes[kind]

    def _hooks(self, hooks: Any) -> Any:
        """Hooks write into what they refer to: into a copy of it, not into the user's own."""
        before, self._isolated = self._isolated, True
        try:
            return self._copy(hooks)
        finally:
            self._isolated = before

    def _slots(self, x: Any, made: Any) -> None:
        for name in copyreg._slotnames(type(x)) or ():  # type: ignore[attr-defined]
            try:
                value = object.__getattribute__(x, name)
            except AttributeError:
                continue
            object.__setattr__(made, name, self._copy(value))

    # -- containers ---------------------------------------------------------------------------------------------

    def _list(self, x: list[Any]) -> list[Any]:
        made: list[Any] = self._done(x, [])
        made.extend(self._copy(v) for v in list(x))
        return made

    def _tuple(self, x: tuple[Any, ...]) -> Any:
        items = [self._copy(v) for v in x]
        if id(x) in self._made:  # it holds itself, by way of another container
            return self._made[id(x)][1]
        if all(a is b for a, b in zip(items, x, strict=True)):
            return self._done(x, x)
        return self._done(x, tuple(items))

    def _dict(self, x: dict[Any, Any]) -> dict[Any, Any]:
        made: dict[Any, Any] = self._done(x, {})
        for k, v in list(x.items()):
            made[self._copy(k)] = self._copy(v)
        return made

    def _set(self, x: Any) -> Any:
        items = [self._copy(v) for v in list(x)]
        return self._done(x, type(x)(items))

    def _deque(self, x: collections.deque[Any]) -> Any:
        made = self._done(x, collections.deque(maxlen=x.maxlen))
        made.extend(self._copy(v) for v in list(x))
        return made

    # -- functions ----------------------------------------------------------------------------------------------

    def _function(self, x: types.FunctionType) -> Any:
        compiled = getattr(x, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            return self._done(x, self._copy(compiled))  # what torch.compile() was given
        isolated = self._isolated and not (x.__module__ or "").startswith(("torch.", "anabranch."))
        defaults, keywords = self._copy(x.__defaults__), self._copy(x.__kwdefaults__)
        if id(x) in self._made:
            return self._made[id(x)][1]
        names = global_names(x.__code__) & x.__globals__.keys() if isolated else set()
        same = defaults is x.__defaults__ and (keywords or None) == (x.__kwdefaults__ or None)
        if not x.__closure__ and not names and same:
            return self._done(x, x)
        space = self._own_globals(x.__globals__) if names else x.__globals__
        cells = tuple(self._cell(c) for c in x.__closure__ or ())
        made = types.FunctionType(x.__code__, space, x.__name__, defaults, cells)
        made.__kwdefaults__ = keywords
        made.__annotations__ = x.__annotations__
        made.__qualname__, made.__module__, made.__doc__ = x.__qualname__, x.__module__, x.__doc__
        self._done(x, made)
        for old, new in zip(x.__closure__ or (), cells, strict=True):
            try:
                content = old.cell_contents
            except ValueError:  # still empty
                continue
            new.cell_contents = self._copy(content)
        for name in names:
            space[name] = self._copy(x.__globals__[name])
        made.__dict__.update({k: self._copy(v) for k, v in list(x.__dict__.items())})
        return made

    def _own_globals(self, space: dict[str, Any]) -> dict[str, Any]:
        if id(space) not in self._globals:
            self._globals[id(space)] = dict(space)
        return self._globals[id(space)]

    def _cell(self, x: types.CellType) -> Any:
        known = self._made.get(id(x))
        return known[1] if known is not None else self._done(x, types.CellType())

    def _method(self, x: types.MethodType) -> Any:
        function, owner = self._copy(x.__func__), self._copy(x.__self__)
        if function is x.__func__ and owner is x.__self__:
            return x
        return types.MethodType(function, owner)

    def _partial(self, x: functools.partial[Any]) -> Any:
        made = functools.partial(
            self._copy(x.func), *(self._copy(a) for a in x.args), **{k: self._copy(v) for k, v in x.keywords.items()}
        )
        return self._done(x, made)

    # -- references that do not keep ----------------------------------------------------------------------------

    def _weak(self, x: Any) -> Any:
        """To the copy, of what else belongs to the model; else as it is."""
        target = x() if isinstance(x, weakref.ref) else _referent(x)
        if not isinstance(target, torch.nn.Module):
            return x
        copied = self._copy(target)
        return self._done(x, weakref.ref(copied) if isinstance(x, weakref.ref) else weakref.proxy(copied))

    # -- all others ---------------------------------------------------------------------------------------------

    def _object(self, x: Any) -> Any:
        kind = type(x)
        if is_handle(kind) or works_with_threads(x):
            return x
        if not (getattr(x, "__dict__", None) or isinstance(x, dict | list | set | tuple) or _has_slots(kind)):
            return self._leaf(x)
        if isinstance(x, tuple):
            items = [self._copy(v) for v in x]
            made = tuple.__new__(kind, items)
            self._done(x, made)
        else:
            base = next((b for b in (dict, list, set, frozenset, collections.deque) if isinstance(x, b)), object)
            try:
                made = base.__new__(collections.OrderedDict if kind is collections.OrderedDict else kind)
            except TypeError:
                return self._leaf(x)  # a class written in C
            self._done(x, made)
        try:
            if isinstance(x, collections.defaultdict):
                made.default_factory = self._copy(x.default_factory)
            if isinstance(x, dict):
                for k, v in list(dict.items(x)):
                    put = collections.OrderedDict if isinstance(x, collections.OrderedDict) else dict
                    put.__setitem__(made, self._copy(k), self._copy(v))
            elif isinstance(x, list):
                list.extend(made, [self._copy(v) for v in list(list.__iter__(x))])
            elif isinstance(x, set):
                set.update(made, [self._copy(v) for v in list(set.__iter__(x))])
            space = getattr(x, "__dict__", None)
            if isinstance(space, dict):
                for name, value in list(space.items()):
                    made.__dict__[name] = self._copy(value)
            self._slots(x, made)
        except (AttributeError, TypeError):
            return self._done(x, x)
        return made

    def _leaf(self, x: Any) -> Any:
        """An object that shows nothing of what is in it."""
        where = type(x).__module__
        if where.startswith("numpy.random"):
            if type(x).__name__ in ("Generator", "RandomState"):
                self.generators.append(x)
            return self._done(x, x)
        if where.partition(".")[0] in ("numpy", "array", "builtins", "itertools"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # of copies of iterators
                    return self._done(x, copy.copy(x))
            except Exception:
                return x
        return x

    _MAKERS: ClassVar[dict[type, Callable[[Copier, Any], Any]]] = {
        list: _list,
        tuple: _tuple,
        dict: _dict,
        set: _set,
        frozenset: _set,
        collections.deque: _deque,
        types.FunctionType: _function,
        types.MethodType: _method,
        functools.partial: _partial,
        weakref.ref: _weak,
        **dict.fromkeys(weakref.ProxyTypes, _weak),
    }


def _referent(proxy: Any) -> Any:
    try:
        return proxy.__repr__.__self__
    except ReferenceError:
        return None


def _has_slots(kind: type) -> bool:
    return bool(copyreg._slotnames(kind))  # type: ignore[attr-defined]

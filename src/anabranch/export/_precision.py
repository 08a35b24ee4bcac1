"""A model in half precision: what gains by it is cast, what loses is kept.

Parameters are cast, but for those whose values do not survive it and those that the model computes other weights
from. Buffers keep their types: they hold running statistics, frequencies and positions, which are few and often large
numbers. While the model is traced, products and convolutions take all that they are given in half precision; what comes
of half and float32 tensors otherwise is float32, by PyTorch's own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import fx
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from anabranch.errors import UnsupportedModel
from anabranch.export._cast_tensors import CastTensors
from anabranch.export._snapshot import Fresh, Snapshot

_aten = torch.ops.aten
_CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HALVES = (torch.float16, torch.bfloat16)


class Cast:
    """A snapshot in half precision, made once for all signatures.

    Immutable but for casts of constants that programs share, which are made with the build lock held.
    """

    def __init__(self, snapshot: Snapshot, precision: torch.dtype) -> None:
        self.precision = precision
        module = snapshot.module
        self._cast: list[str] = []
        self._kept: dict[str, list[str]] = {}
        #: Names of parameters that do not fit into the precision.
        self._unfit: set[str] = set()
        self._casts = CastTensors()

        chosen: dict[int, torch.nn.Parameter] = {}
        needed = _computed_with(module)
        for name, p in module.named_parameters(remove_duplicate=False):
            if p.dtype not in _CASTABLE or p.dtype is precision:
                self._keep(_plain(p.dtype), name)
            elif id(p) in needed:
                self._keep(needed[id(p)], name)
            elif id(p) in chosen or not (why := unfit(p, precision)):
                chosen[id(p)] = p
                self._cast.append(name)
            else:
                self._keep(why, name)
                self._unfit.add(f"model.{name}")
        for name, b in module.named_buffers(remove_duplicate=False):
            self._keep("buffers" if b.is_floating_point() else _plain(b.dtype), name)
        replaced = _converted(list(chosen.values()), precision)
        self.snapshot = snapshot.replacing(replaced)
        self._whole = snapshot
        for part in self.snapshot.module.modules():
            if isinstance(part, torch.nn.RNNBase):
                part.register_forward_pre_hook(_Enter(precision), with_kwargs=True)
        #: By id of a parameter of ``snapshot``: what it was cast from.
        self._sources = {id(new): chosen[i] for i, new in replaced.items()}

    def _keep(self, why: str, name: str) -> None:
        self._kept.setdefault(why, []).append(name)

    def explain(self) -> list[str]:
        """What is cast and what is kept, by name."""
        name = str(self.precision).removeprefix("torch.")
        lines = [f"precision {name}: cast: {', '.join(self._cast) or 'no parameter'}"]
        lines += [f"precision {name}: kept, {why}: {', '.join(names)}" for why, names in self._kept.items()]
        return lines

    def original(self, fresh: Fresh, tensor: torch.Tensor) -> Callable[[], torch.Tensor | None] | None:
        """As :meth:`Fresh.original`, of what was cast as well."""
        return fresh.original(tensor) or self._whole.original(tensor)

    def fold(
        self,
        gm: fx.GraphModule,
        weights: dict[fx.Node, tuple[str, torch.Tensor]],
        fresh: Fresh,
        aside: Callable[..., Any],
    ) -> None:
        """Take a weight that was cast before, or never was, in place of one that each call would cast.

        ``weights``: placeholders with their names and tensors of ``fresh``, a copy of ``snapshot``. ``aside`` makes a
        call and waits until what it queued is done: streams will read what is cast here without waiting for it.
        """
        for node, (name, tensor) in list(weights.items()):
            if name in self._unfit:
                self._check_products(node, name)
            self._check_scalar(node, name, tensor)
            source = fresh.source(tensor)
            source = self._sources.get(id(source), source)
            for user in [n for n in node.users if n.target is _aten._to_copy.default]:
                dtype: Any = user.kwargs.get("dtype")
                if dtype not in _CASTABLE or set(user.kwargs) != {"dtype"} or not source.is_floating_point():
                    continue
                with gm.graph.inserting_after(node):
                    new = gm.graph.placeholder(f"{node.name}_{_plain(dtype)}")
                new.meta = {**node.meta, "val": user.meta["val"]}
                weights[new] = (name, self._casts.get(source, dtype, aside))
                user.replace_all_uses_with(new)
                gm.graph.erase_node(user)
        order = [n for n in gm.graph.find_nodes(op="placeholder") if n in weights]
        ordered = {n: weights[n] for n in order}
        weights.clear()
        weights.update(ordered)

    def _check_products(self, node: fx.Node, name: str) -> None:
        """A parameter that does not fit may be added or multiplied with in float32, but products would round it."""
        stack = [node]
        while stack:
            for user in stack.pop().users:
                if user.target is _aten._to_copy.default and user.kwargs.get("dtype") is self.precision:
                    self._does_not_fit(name)
                if isinstance(user.target, torch._ops.OpOverload) and any(
                    r.alias_info is not None for r in user.target._schema.returns
                ):
                    stack.append(user)

    def _check_scalar(self, node: fx.Node, name: str, tensor: torch.Tensor) -> None:
        """A number, to PyTorch's rules: it does not make a float32 result of half precision data."""
        if tensor.dim() or tensor.dtype in (self.precision, *_HALVES) or not tensor.is_floating_point():
            return
        halved = any(getattr(n.meta.get("val"), "dtype", None) is self.precision for n in node.users)
        if halved and unfit(tensor, self.precision):
            self._does_not_fit(name)

    def _does_not_fit(self, name: str) -> NoReturn:
        other = "precision=torch.bfloat16 holds it; or " if self.precision is torch.float16 else ""
        raise UnsupportedModel(
            f"precision={self.precision} given, and the model computes in it with {name.removeprefix('model.')!r},"
            f" whose values it cannot hold; {other}scale the values, or leave precision out."
        )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _computed_with(module: torch.nn.Module) -> dict[int, str]:
    """Parameters that the model computes something else from in their own type, by id, and why."""
    found: dict[int, str] = {}
    for part in module.modules():
        if isinstance(part, torch.nn.modules.batchnorm._NormBase) and part.running_mean is not None:
            found.update((id(p), "with running statistics") for p in part.parameters(recurse=False))
        if isinstance(part, parametrize.ParametrizationList):
            found.update((id(p), "a weight is computed from them") for p in part.parameters())
        for hook in part._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):  # weight_norm, spectral_norm, prune
                name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "")
                found.update(
                    (id(p), "a weight is computed from them")
                    for n, p in part.named_parameters(recurse=False)
                    if n.startswith(f"{name}_")
                )
    return found


def unfit(p: torch.Tensor, precision: torch.dtype) -> str:
    """Why a parameter's values would not survive, if they would not."""
    if p.is_meta or not p.numel():
        return ""
    finite = p.detach().float() if p.dtype not in (torch.float32, torch.float64) else p.detach()
    least, most = torch.aminmax(finite)
    largest = max(abs(float(least)), abs(float(most)))
    if largest in (float("inf"),) or largest != largest:
        finite = finite[torch.isfinite(finite)]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
    limits = torch.finfo(precision)
    if float(torch.tensor(largest).to(precision)) == float("inf"):
        return f"beyond {limits.max:g}"
    if 0 < largest < limits.tiny:
        return f"below {limits.tiny:.1e} all over"
    return ""


def _converted(parameters: Iterable[torch.nn.Parameter], precision: torch.dtype) -> dict[int, torch.nn.Parameter]:
    """Each in the other type, by id. What lies in one storage does so afterwards."""
    storages: dict[int, list[torch.nn.Parameter]] = {}
    for p in parameters:
        storages.setdefault(p.untyped_storage()._cdata, []).append(p)
    made: dict[int, torch.nn.Parameter] = {}
    for group in storages.values():
        bases = {(p.storage_offset(), p.shape, p.stride()) for p in group}
        whole = None
        if len(bases) > 1 and len({p.dtype for p in group}) == 1:
            first = group[0].detach()
            size = first.untyped_storage().nbytes() // first.element_size()
            whole = first.as_strided((size,), (1,), 0).to(precision)
        for p in group:
            data = (
                p.detach().to(precision) if whole is None else whole.as_strided(p.shape, p.stride(), p.storage_offset())
            )
            same = next((made[id(q)] for q in group if id(q) in made and q.is_set_to(p)), None)
            made[id(p)] = torch.nn.Parameter(same.detach() if same is not None else data, p.requires_grad)
    return made


class _Enter:
    """A hook of recurrent layers, which refuse another type than their weights' before an operator sees it."""

    def __init__(self, precision: torch.dtype) -> None:
        self._precision = precision

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        def enter(x: Any) -> Any:
            if isinstance(x, tuple | list):
                return tuple(map(enter, x))
            return x.to(self._precision) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        return tuple(map(enter, args)), {k: enter(v) for k, v in kwargs.items()}


# -- while the model is traced --------------------------------------------------------------------------------------

_PLACES = (torch, torch.Tensor, functional, torch._C._nn, torch._C._VariableFunctions, torch.linalg)


def _functions(*names: str) -> frozenset[Any]:
    found = {getattr(place, name, None) for place in _PLACES for name in names}
    return frozenset(found - {None})


#: These gain: they take everything in half precision.
_PRODUCTS = _functions(
    *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm"),
    *("mv", "addmv", "dot", "inner", "einsum", "tensordot", "chain_matmul", "multi_dot", "vecdot"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv_tbc"),
    *("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention"),
    *("_transformer_encoder_layer_fwd", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
)
#: These take operands of one type only: the wider one.
_OF_ONE_TYPE = _functions(
    *("lerp", "lerp_", "grid_sample", "bucketize", "searchsorted", "prelu", "cross", "cdist", "embedding_bag"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "hypot", "dist", "quantile", "nanquantile"),
)
#: These too, and give the type of their first operand.
_NORMS = _functions("layer_norm", "group_norm", "rms_norm", "instance_norm")
_BATCH_NORM = _functions("batch_norm")
#: These write into their first operand, or a copy of it.
_INTO = _functions(
    *("addmm_", "addbmm_", "baddbmm_", "addmv_", "addr_"),
    *("index_put", "index_put_", "index_add", "index_add_", "index_copy", "index_copy_", "masked_scatter"),
    *("masked_scatter_", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"),
    *("select_scatter", "slice_scatter", "diagonal_scatter"),
)
#: These have no half precision, or lose by it.
_FLOAT32 = (
    frozenset(
        getattr(place, name, None)
        for place, names in (
            (torch.fft, [n for n in torch.fft.__all__ if "shift" not in n]),
            (torch.linalg, [n for n in dir(torch.linalg) if callable(getattr(torch.linalg, n)) and n.islower()]),
            (
                torch,
                ("stft", "istft", "complex", "polar", "view_as_complex", "inverse", "cholesky", "det", "logdet", "svd"),
            ),
            (torch.Tensor, ("stft", "istft", "inverse", "cholesky", "det", "logdet", "svd", "matrix_exp", "slogdet")),
            (torch, ("svd", "matrix_exp", "slogdet", "pinverse", "matrix_power")),
        )
        for name in names
    )
    - {None}
    - _functions("norm", "vector_norm", "matrix_norm", "vecdot", "matmul", "multi_dot", "diagonal", "cross")
)


class HalfPrecision(TorchFunctionMode):
    """While it is on, operators that would refuse operands of several floating types get operands of one."""

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self._precision = precision

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        floats = [x for x in _tensors(args, kwargs) if x.is_floating_point()]
        dtypes = {x.dtype for x in floats}
        if func in _FLOAT32 and dtypes & set(_HALVES):
            return _call(func, args, kwargs, torch.float32, _HALVES)
        if len(dtypes) < 2:
            return func(*args, **kwargs)
        if func in _PRODUCTS:
            if func is functional.scaled_dot_product_attention:
                args, kwargs = self._narrow_mask(args, kwargs)
            return _call(func, args, kwargs, self._precision)
        widest = max(dtypes, key=lambda d: d.itemsize)
        if func in _BATCH_NORM:
            return func(args[0], *_to(args[1:], widest), **_to(kwargs, widest))
        if func in _NORMS:
            return _call(func, args, kwargs, widest).to(floats[0].dtype)
        if func in _INTO:
            return func(args[0], *_to(args[1:], floats[0].dtype), **_to(kwargs, floats[0].dtype))
        if func in _OF_ONE_TYPE:
            return _call(func, args, kwargs, widest)
        return func(*args, **kwargs)

    def _narrow_mask(self, args: Any, kwargs: Any) -> Any:
        """Large negative numbers of a mask stay finite: a row of nothing but infinities has no softmax."""
        limits = torch.finfo(self._precision)

        def narrow(mask: Any) -> Any:
            if not isinstance(mask, torch.Tensor) or mask.dtype not in (torch.float32, torch.float64):
                return mask
            return torch.where(mask.isinf(), mask, mask.clamp(limits.min, limits.max))

        if len(args) > 3:
            return (*args[:3], narrow(args[3]), *args[4:]), kwargs
        return args, {k: narrow(v) if k == "attn_mask" else v for k, v in kwargs.items()}


def _call(func: Any, args: Any, kwargs: Any, dtype: torch.dtype, which: Any = _CASTABLE) -> Any:
    return func(*_to(args, dtype, which), **_to(kwargs, dtype, which))


def _to(x: Any, dtype: torch.dtype, which: Any = _CASTABLE) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(dtype) if x.dtype in which and x.dtype is not dtype else x
    if type(x) in (tuple, list):
        return type(x)(_to(v, dtype, which) for v in x)
    if isinstance(x, Mapping):
        return {k: _to(v, dtype, which) for k, v in x.items()}
    return x


def _tensors(*values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for x in values:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif type(x) in (tuple, list):
            found += _tensors(*x)
        elif type(x) is dict:
            found += _tensors(*x.values())
    return found

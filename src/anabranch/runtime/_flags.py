"""PyTorch's process-wide numerics flags, as they were at compile.

Operators read these flags each time they are queued, so a direct call under other flags would not give the captured
graph's bits. They cannot be set for one call only: other threads would see them change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from anabranch.backends import TF32
from anabranch.errors import FlagsChanged

_Getter = Callable[[], Any]
#: What torch.backends.*.fp32_precision reads; the properties cost ten times as much.
_fp32 = torch._C._get_fp32_precision_getter


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # Somebody has set torch.backends.*.fp32_precision, and PyTorch refuses to name one precision for all backends.
        return "set by backend"


_COMMON: dict[str, _Getter] = {
    "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
    "torch.set_float32_matmul_precision": _matmul_precision,
}
_CUDA: dict[str, _Getter] = {
    **_COMMON,
    "torch.backends.cuda.matmul.fp32_precision": partial(_fp32, "cuda", "matmul"),
    "torch.backends.cudnn.conv.fp32_precision": partial(_fp32, "cuda", "conv"),
    "torch.backends.cudnn.rnn.fp32_precision": partial(_fp32, "cuda", "rnn"),
    "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction": (
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction
    ),
    "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction": (
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction
    ),
    "torch.backends.cuda.matmul.allow_fp16_accumulation": torch._C._get_cublas_allow_fp16_accumulation,
    "torch.backends.cudnn.enabled": torch._C._get_cudnn_enabled,
    "torch.backends.cudnn.benchmark": torch._C._get_cudnn_benchmark,
    "torch.backends.cudnn.deterministic": torch._C._get_cudnn_deterministic,
    "torch.backends.cuda.enable_flash_sdp": torch._C._get_flash_sdp_enabled,
    "torch.backends.cuda.enable_mem_efficient_sdp": torch._C._get_mem_efficient_sdp_enabled,
    "torch.backends.cuda.enable_math_sdp": torch._C._get_math_sdp_enabled,
    "torch.backends.cuda.enable_cudnn_sdp": torch._C._get_cudnn_sdp_enabled,
}
_CPU: dict[str, _Getter] = {
    **_COMMON,
    "torch.backends.mkldnn.enabled": torch._C._get_mkldnn_enabled,
    "torch.backends.mkldnn.matmul.fp32_precision": partial(_fp32, "mkldnn", "matmul"),
    "torch.backends.mkldnn.conv.fp32_precision": partial(_fp32, "mkldnn", "conv"),
    "torch.backends.mkldnn.rnn.fp32_precision": partial(_fp32, "mkldnn", "rnn"),
}


#: What exporting reads, once for all calls: a later signature must find it as the first one did.
_EXPORT: dict[str, _Getter] = {
    "torch.set_default_dtype": torch.get_default_dtype,
    "torch.backends.mha.set_fastpath_enabled": torch.backends.mha.get_fastpath_enabled,
    "torch.backends.opt_einsum.enabled": lambda: torch.backends.opt_einsum.enabled,
    "torch.backends.opt_einsum.strategy": lambda: torch.backends.opt_einsum.strategy,
}


#: Of the flags that say how float32 is computed on a GPU, what each is about.
_TF32 = {
    "products": "torch.backends.cuda.matmul.fp32_precision",
    "convolutions": "torch.backends.cudnn.conv.fp32_precision",
    "recurrent": "torch.backends.cudnn.rnn.fp32_precision",
}


class Flags:
    """A snapshot of the flags that matter on one kind of device; ``export``: and of those that exporting reads."""

    def __init__(self, kind: str, export: bool = False) -> None:
        getters = (_CUDA if kind == "cuda" else _CPU) | (_EXPORT if export else {})
        self._names = tuple(getters)
        self._getters = tuple(getters.values())
        self._values = tuple(get() for get in self._getters)

    def unchanged(self) -> bool:
        now = [get() for get in self._getters]
        return tuple(now) == self._values or not self._differences(now)

    def check(self) -> None:
        """Raises :class:`~anabranch.errors.FlagsChanged` where one has another value than at compile."""
        if not self.unchanged():
            raise FlagsChanged(
                f"numerics flags changed since compile: {self.changes()}. This call would not give the engine's bits."
                " Set them back, or compile a new engine under the new flags."
            )

    def changes(self) -> str:
        """Each changed flag with its value at compile and now."""
        differences = self._differences([get() for get in self._getters])
        return "; ".join(f"{name} was {then!r} at compile and is {new!r}" for name, then, new in differences)

    def _differences(self, now: Sequence[Any]) -> list[tuple[str, Any, Any]]:
        # An fp32_precision that nobody has set reads "none" and computes as "ieee", which is what it reads once
        # torch.set_float32_matmul_precision has been changed and set back.
        def plain(value: Any) -> Any:
            return "ieee" if value == "none" else value

        return [x for x in zip(self._names, self._values, now, strict=True) if plain(x[1]) != plain(x[2])]

    @property
    def tf32(self) -> TF32:
        """What may be computed in TF32; nothing on devices that have none."""
        values = dict(zip(self._names, self._values, strict=True))
        return TF32(**{kind: values.get(name) == "tf32" for kind, name in _TF32.items()})

    def __getitem__(self, name: str) -> Any:
        return self._values[self._names.index(name)]


def sensitive(graph: fx.Graph) -> bool:
    """Whether any operator of the graph may read the flags: all but pointwise ones and views are assumed to."""
    for node in graph.nodes:
        if node.op == "call_function":
            if not isinstance(node.target, torch._ops.OpOverload):
                return True
            views = any(r.alias_info is not None for r in node.target._schema.returns)
            if not views and torch.Tag.pointwise not in node.target.tags:
                return True
    return False


class Watch:
    """The flags that a program's operators read when they are queued, as they were at compile.

    Threads: any. Other threads may set flags at any time: what was queued while they changed is to be thrown away.
    """

    def __init__(self, flags: Flags, graph: fx.Graph, asks_default_dtype: bool) -> None:
        self.flags = flags
        #: Whether it reads any. ``asks_default_dtype``: that one, if no other.
        self.reads_any = sensitive(graph) or asks_default_dtype

    def unchanged(self) -> bool:
        """Whether operators that are queued now compute what they did at compile."""
        return not self.reads_any or self.flags.unchanged()

    def check(self) -> None:
        """Raises :class:`~anabranch.errors.FlagsChanged` where they do not."""
        if self.reads_any:
            self.flags.check()

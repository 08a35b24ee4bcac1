"""Attention over lengths that vary, on tensors that are on a GPU in name only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from anabranch.export._attention import take_any_length

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def has_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def traced(
    attend: Any, dtype: torch.dtype = torch.half, varies: bool = True, head: int = 64, keys: int | None = None
) -> Any:
    """The graph of a function of three tensors (2, 4, length, head); ``keys``: the length of the last two."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    how = DimDynamic.DYNAMIC if varies else DimDynamic.STATIC
    sizes = [DimDynamic.STATIC, DimDynamic.STATIC, how, DimDynamic.STATIC]
    real = torch.empty(2, 4, 7, head, dtype=dtype, device="meta")
    x = mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(sizes))
    with mode:
        x = torch.empty(2, 4, x.shape[2], head, dtype=dtype, device="cuda")
    graph = torch.fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    q.meta["val"] = x
    with mode:
        k.meta["val"] = v.meta["val"] = x if keys is None else torch.empty(2, 4, keys, head, dtype=dtype, device="cuda")
    made = attend(graph, q, k, v)
    with mode:
        made.meta["val"] = torch.empty_like(x)
    doubled = graph.call_function(aten.mul.Tensor, (made, 2))
    graph.output((doubled,))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def plain(graph: torch.fx.Graph, *qkv: torch.fx.Node, **options: Any) -> torch.fx.Node:
    return graph.call_function(aten.scaled_dot_product_attention.default, qkv, options)


def targets(module: Any) -> list[Any]:
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


def test_lengths_that_vary_have_kernels_for_any() -> None:
    module = traced(lambda *given: plain(*given, is_causal=True, scale=0.5))
    take_any_length(module)
    flash = module.graph.find_nodes(op="call_function", target=aten._scaled_dot_product_flash_attention.default)
    assert len(flash) == 1
    assert flash[0].args[3:] == (0.0, True)
    assert flash[0].kwargs == {"scale": 0.5}
    assert aten.scaled_dot_product_attention.default not in targets(module)
    (result,) = flash[0].users
    assert result.meta["val"].shape == flash[0].args[0].meta["val"].shape
    module.graph.lint()


def test_queries_may_have_another_length() -> None:
    module = traced(plain, keys=9)
    take_any_length(module)
    assert aten._scaled_dot_product_flash_attention.default in targets(module)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"varies": False}, {}),
        ({"dtype": torch.float32}, {}),
        ({"head": 36}, {}),
        ({"head": 512}, {}),
        ({}, {"dropout_p": 0.5}),
        ({"keys": 9}, {"is_causal": True}),  # the first query sees the first key, and not the third
        ({}, {"enable_gqa": True}),
    ],
    ids=str,
)
def test_what_these_kernels_do_not_take_stays(options: dict[str, Any], given: dict[str, Any]) -> None:
    module = traced(lambda *nodes: plain(*nodes, **given), **options)
    before = targets(module)
    take_any_length(module)
    assert targets(module) == before


def test_what_one_has_chosen_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    module = traced(plain)
    before = targets(module)
    take_any_length(module)
    assert targets(module) == before

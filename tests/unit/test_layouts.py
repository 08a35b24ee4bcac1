"""Inductor's results lie in memory as eager's: what its decompositions lay out otherwise is copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

import anabranch
from anabranch.backends._layouts import keep_layouts, keeping_strides

_aten = torch.ops.aten


class _Select(nn.Module):
    """A picture whose rows are picked: eager's is contiguous, that of Inductor's decomposition in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.register_buffer("rows", torch.tensor([4, 0, 2]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        # A view that only a contiguous result can be seen through.
        return torch.index_select(y, 2, self.rows), torch.index_select(y, 3, self.rows).view(-1)


def test_a_result_has_eagers_strides() -> None:
    model = _Select().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 7).contiguous(memory_format=torch.channels_last)
    engine = anabranch.compile(model, (x,), backend="inductor")
    for _ in range(2):
        x = torch.randn(2, 3, 6, 7).contiguous(memory_format=torch.channels_last)
        for y, expected in zip(engine(x), model(x), strict=True):
            assert y.stride() == expected.stride()
            torch.testing.assert_close(y, expected)


def _graph(target: Any, device: str, *args: Any) -> fx.GraphModule:
    """One operator on a picture in channels_last, as an exported program has it."""
    with FakeTensorMode() as mode:
        x = torch.empty((2, 8, 6, 4), device=device).to(memory_format=torch.channels_last)
        result = target(x, *args)
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    made = graph.call_function(target, (node, *args))
    made.meta["val"] = result
    graph.output((made,))
    assert result.fake_mode is mode
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(("device", "strides"), [("cuda", (192, 96, 8, 1)), ("cpu", (192, 1, 16, 2))])
def test_pixel_shuffle_lies_as_the_devices_own(device: str, strides: tuple[int, ...]) -> None:
    module = _graph(_aten.pixel_shuffle.default, device, 2)
    keep_layouts(module)
    (result,) = module.graph.output_node().args[0]
    assert result.meta["val"].stride() == strides
    targets = [n.target for n in module.graph.nodes if n.op == "call_function"]
    # On the CPU the decomposition gives what eager does.
    assert (_aten.clone.default in targets) == (device == "cuda")
    x = torch.randn(2, 8, 6, 4).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(module(x)[0], torch.pixel_shuffle(x, 2))


def test_what_lies_right_is_left_alone() -> None:
    for target, args in ((_aten.hardswish.default, ()), (_aten.permute.default, ([0, 2, 3, 1],))):
        module = _graph(target, "cpu", *args)
        before = str(module.graph)
        keep_layouts(module)
        assert str(module.graph) == before


def test_a_padded_result_is_copied_and_no_other() -> None:
    module = _graph(_aten.relu.default, "cpu")
    wide = torch.randn(2, 6, 4, 16)
    padded, dense = wide[..., :8].permute(0, 3, 1, 2), wide[..., :8].contiguous().permute(0, 3, 1, 2)
    for given, is_copied in ((padded, True), (dense, False), (dense.contiguous(), False)):
        kernels = keeping_strides(module, lambda inputs, y=given: [y])
        for _ in range(2):
            (y,) = kernels([])
            assert torch.equal(y, given)
            assert (y is not given) is is_copied
            assert not is_copied or y.stride() == dense.stride()

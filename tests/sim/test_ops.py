"""Operators on ``sim``: the CPU's answers, and nothing runs before somebody waits."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import CASES, Case
from torch.utils import _pytree as pytree

DEVICE = "sim:0"  # known once the backend is loaded


@pytest.fixture(autouse=True)
def core() -> Iterator[Any]:
    """The machine, idle before and after."""
    from anabranch import sim

    sim.core.reset()
    yield sim.core
    sim.core.reset()


def _inputs(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [spec.make(dtype, generator) for spec in case.inputs]


def _changed(case: Case, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [spec.change(t) for spec, t in zip(case.inputs, tensors, strict=True)]


def _same(got: Any, expected: Any) -> None:
    got = pytree.tree_map_only(torch.Tensor, lambda t: t.cpu(), got)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=None, atol=None)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, d, id=f"{c.name}-{str(d)[6:]}") for c in CASES for d in c.dtypes],
)
def test_gives_the_cpus_answer(core: Any, case: Case, dtype: torch.dtype) -> None:
    host = _inputs(case, dtype)
    device = [t.to(DEVICE) for t in host]
    expected = case.run(*_changed(case, host))
    torch.accelerator.synchronize()
    assert core.idle()
    with torch.Stream(device=DEVICE) as stream:
        got = case.run(*_changed(case, device))
        if not case.waits:
            # Nothing has run: what came back is the allocator's poison.
            assert core.idle() == case.empty
        for t in pytree.tree_leaves(got):
            assert not isinstance(t, torch.Tensor) or str(t.device) == DEVICE
        _same(got, expected)
        stream.synchronize()
    assert core.idle()
    _same(device, host)  # what an operator changes, and what it leaves alone


def test_enough_operators_are_covered() -> None:
    assert len({case.name for case in CASES}) >= 200


def _on(stream: torch.Stream, *tensors: torch.Tensor) -> list[torch.Tensor]:
    with stream:
        return [t.to(DEVICE) for t in tensors]


# -- what is queued, what waits --------------------------------------------------------------------------------------


def test_nothing_runs_before_a_wait(core: Any) -> None:
    x = torch.arange(4.0).to(DEVICE)
    y, z = torch.full((4,), 3.0, device=DEVICE), torch.full((8,), 3.0, device=DEVICE)
    core.synchronize(-1)
    torch.mul(x, 2, out=y)
    torch.cat([y, x], out=z)
    assert not core.idle()
    # The host looks at the memory, without waiting: it is as it was.
    assert (ctypes.c_float * 4).from_address(y.data_ptr())[:] == [3.0] * 4
    assert (ctypes.c_float * 8).from_address(z.data_ptr())[:] == [3.0] * 8
    assert z.tolist() == [0, 2, 4, 6, 0, 1, 2, 3]
    assert core.idle()


def test_a_host_wait_is_for_one_stream(core: Any) -> None:
    core.policy("lazy", 0)
    a, b = torch.Stream(device=DEVICE), torch.Stream(device=DEVICE)
    x, y = torch.ones(3).to(DEVICE), torch.ones(3).to(DEVICE)
    with a:
        x.mul_(2)
    with b:
        assert y.mul_(3)[1].item() == 3
    assert not core.idle()
    a.synchronize()
    assert core.idle()
    core.policy("fifo", 0)


def test_numbers_of_the_host_are_taken_at_the_call(core: Any) -> None:
    number = torch.tensor(2.0)
    y = torch.ones(3).to(DEVICE) * number
    number.fill_(9)
    assert y.tolist() == [2, 2, 2]


def test_an_error_in_a_kernel_shows_at_the_next_wait(core: Any) -> None:
    x = torch.ones(3).to(DEVICE)
    y = x.index_select(0, torch.tensor([7]).to(DEVICE))
    with pytest.raises(RuntimeError, match=r"index_select.*out of range"):
        y.cpu()
    assert "index_select" in core.lost()


def test_data_dependent_errors_are_the_callers(core: Any) -> None:
    with pytest.raises(RuntimeError, match="bincount"):
        torch.bincount(torch.tensor([-1, 2]).to(DEVICE))
    assert core.lost() is None


def test_shape_errors_come_at_the_call_in_pytorchs_words(core: Any) -> None:
    x, y = torch.ones(2, 3).to(DEVICE), torch.ones(4, 5).to(DEVICE)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(2x3 and 4x5\)"):
        x @ y
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        x + y
    with pytest.raises(IndexError, match="mask"):
        x[torch.ones(3, dtype=torch.bool).to(DEVICE)]
    with pytest.raises(IndexError, match="Dimension out of range"):
        x.cumsum(5)
    with pytest.raises(RuntimeError, match="memory location"):
        x.view(6)[1:].copy_(x.view(6)[:-1])
    with pytest.raises(RuntimeError, match="memory location"):
        x.view(6)[1:].add_(x.view(6)[:-1])
    assert core.lost() is None


def test_devices_do_not_mix(core: Any) -> None:
    x, y, host = torch.ones(3).to("sim:0"), torch.ones(3).to("sim:1"), torch.ones(3)
    for other in y, host:
        with pytest.raises(RuntimeError, match=f"found at least two devices, sim:0 and {other.device}"):
            x + other
    with pytest.raises(RuntimeError, match="same device"):
        torch.add(x, x, out=host)
    with pytest.raises(RuntimeError, match="same device"):
        torch.mm(x[None], y[:, None])
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        x[torch.zeros(1, dtype=torch.long).to("sim:1")]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("aten::histogram.bin_ct", lambda x: torch.histogram(x, 3)),
        ("aten::_lazy_clone", lambda x: x._lazy_clone()),
        ("aten::_sobol_engine_draw", lambda x: torch._sobol_engine_draw(x, 1, x, 1, 0, torch.float32)),
        ("aten::_fused_dropout", lambda x: torch._fused_dropout(x, 0.5)),
        ("aten::geqrf", lambda x: torch.geqrf(x[None])),
        ("aten::_to_sparse", lambda x: x.to_sparse()),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(core: Any, name: str, call: Any) -> None:
    x = torch.ones(3).to(DEVICE)
    core.synchronize(-1)
    with pytest.raises(NotImplementedError, match=name.replace(".", r"\.")):
        call(x)
    assert core.lost() is None


def test_modes_of_the_waiting_thread_do_not_leak(core: Any) -> None:
    x, w = torch.randn(2, 3), torch.randn(3, 3)
    expected = x @ w
    a, b = x.to(DEVICE), w.to(DEVICE)
    y = a @ b
    with torch.autocast("cpu", torch.bfloat16), torch.device(DEVICE), torch.inference_mode():
        z = F.pad(a, (1, 1), mode="reflect")
        assert y.cpu().dtype == torch.float32
    assert torch.equal(y.cpu(), expected)
    assert torch.equal(z.cpu(), F.pad(x, (1, 1), mode="reflect"))
    with torch.inference_mode():
        made = a * 2
    assert made.is_inference()
    with torch.device(DEVICE):
        assert str(torch.ones(2).device) == DEVICE


def test_autocast(core: Any) -> None:
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    with torch.autocast("sim", torch.bfloat16):
        y = F.linear(x.to(DEVICE), w.to(DEVICE))
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(y.cpu(), F.linear(x, w))


def test_work_owns_no_device_memory(core: Any) -> None:
    core.policy("lazy", 0)
    x = torch.ones(64).to(DEVICE)
    side = torch.Stream(device=DEVICE)
    with side:
        y = x * 2
    del x  # nobody recorded it for the side stream
    z = torch.full((64,), 5.0, device=DEVICE)
    torch.accelerator.current_stream().synchronize()
    with side:
        assert y.cpu()[0].item() == 10
    assert z[0].item() == 5
    core.policy("fifo", 0)


def test_gaps_are_not_touched(core: Any) -> None:
    x = torch.zeros(4, 6, device=DEVICE)
    core.synchronize(-1)
    x[1:3, :2].fill_(1)
    (head,) = core.heads()
    written = [(lo, hi) for key, lo, hi, mode in head[3] if key.startswith("m") and mode == 1]
    assert written == [(24, 32), (48, 56)]
    core.synchronize(-1)
    y = torch.empty(2, 4, device=DEVICE)
    core.synchronize(-1)
    torch.add(x.t()[:2], x[0, :4], out=y)
    (head,) = core.heads()
    read = [(lo, hi) for key, lo, hi, mode in head[3] if key.startswith("m") and mode == 0]
    assert sorted(read) == [(0, 8), (0, 16), (24, 32), (48, 56), (72, 80)]


def test_what_meta_kernels_said_is_not_mixed_up(core: Any) -> None:
    x = torch.arange(6.0).to(DEVICE)
    for _ in range(2):
        assert x.add(x).dtype == torch.float32
        assert x.add(2).dtype == torch.float32
        assert x.add(torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float32
        assert x.long().add(2.5).dtype == torch.float32
        assert x.long().add(2).dtype == torch.int64
        assert x[:3].add_(x[3:]).shape == (3,)
        with pytest.raises(RuntimeError, match="memory location"):
            x[:3].add_(x[1:4])
        torch.set_default_dtype(torch.float64)
        try:
            assert x.long().add(2.5).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_captured(core: Any) -> None:
    from anabranch import sim

    x, r = torch.ones(4).to(DEVICE), torch.zeros(4, device=DEVICE)
    core.synchronize(-1)
    stream = torch.Stream(device=DEVICE)
    with pytest.raises(RuntimeError, match="pageable"), stream, sim.graph(sim.Graph()):
        torch.ones(3).to(DEVICE, non_blocking=True)
    core.reset()
    graph = sim.Graph()
    with stream, sim.graph(graph):
        x.mul_(2)
        r.uniform_()
    assert x.tolist() == [1, 1, 1, 1]
    seen = set()
    for _ in range(2):
        graph.replay()
        torch.accelerator.synchronize()
        seen.add(tuple(r.tolist()))
    assert x.tolist() == [4, 4, 4, 4]
    assert len(seen) == 2  # each launch draws anew


# -- copies ------------------------------------------------------------------------------------------------------------


def test_pageable_memory_is_read_at_the_call(core: Any) -> None:
    host = torch.ones(4)
    x = host.to(DEVICE, non_blocking=True)
    assert not core.idle()
    host.fill_(7)
    assert x.tolist() == [1, 1, 1, 1]
    y = torch.ones(4).to(DEVICE)
    assert core.idle()
    assert y.tolist() == [1, 1, 1, 1]


def test_pinned_memory_is_read_when_the_copy_runs(core: Any) -> None:
    host = torch.ones(4, pin_memory=True)
    assert host.is_pinned()
    x = torch.empty(4, device=DEVICE)
    x.copy_(host, non_blocking=True)
    half = host.to(DEVICE, torch.float16, non_blocking=True)
    host.fill_(7)
    assert x.tolist() == [7, 7, 7, 7]
    assert half.tolist() == [7, 7, 7, 7]
    x.copy_(host[:1], non_blocking=True)  # not dense: read at once
    host.fill_(8)
    assert x.tolist() == [7, 7, 7, 7]
    x.copy_(host)
    assert core.idle()


def test_pinned_memory_lives_until_it_was_read(core: Any) -> None:
    host = torch.ones(1000, pin_memory=True)
    x = host.to(DEVICE, non_blocking=True)
    del host
    torch.full((1000,), 3.0, pin_memory=True)
    assert x.sum().item() == 1000


def test_results_arrive_in_pinned_memory_when_the_copy_runs(core: Any) -> None:
    x = torch.ones(4).to(DEVICE) * 2
    host = x.to("cpu", non_blocking=True)
    assert host.is_pinned()
    late = torch.zeros(4, dtype=torch.float64, pin_memory=True)
    late.copy_(x, non_blocking=True)
    assert not core.idle()
    assert late.tolist() == [0, 0, 0, 0]
    torch.accelerator.synchronize()
    assert host.tolist() == late.tolist() == [2, 2, 2, 2]
    pageable = torch.zeros(4, 2)[:, 0]
    pageable.copy_(x, non_blocking=True)
    assert core.idle()
    assert pageable.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("policy", ["fifo", "lazy", "random"])
def test_copies_between_devices_are_ordered_on_both_streams(core: Any, policy: str) -> None:
    core.policy(policy, 3)
    streams = [torch.Stream(device=f"sim:{i}") for i in range(2)]
    with streams[0], streams[1]:
        host = torch.arange(12.0).view(3, 4)
        x = host.to("sim:0") * 2
        y = torch.zeros(4, 3, dtype=torch.float64).to("sim:1")
        y.add_(1)  # before the copy
        y.copy_(x.t())
        z = y + 1  # after it
        x.zero_()
        assert not core.idle()
        torch.testing.assert_close(z.cpu(), host.t().double() * 2 + 1)
        assert str(z.to("sim:0").device) == "sim:0"
    core.policy("fifo", 0)


def test_devices_have_streams_of_their_own(core: Any) -> None:
    core.policy("lazy", 0)
    x = torch.ones(3).to("sim:1")
    y = x.mul_(2)[1:]  # the current device is sim:0
    assert str(y.device) == "sim:1"
    torch.accelerator.current_stream("sim:0").synchronize()
    assert not core.idle()
    torch.accelerator.current_stream("sim:1").synchronize()
    assert core.idle()
    assert y.tolist() == [2, 2]
    core.policy("fifo", 0)


# -- random numbers ----------------------------------------------------------------------------------------------------


def _draws(**options: Any) -> list[torch.Tensor]:
    x = torch.zeros(50, device=DEVICE)
    return [
        torch.rand(50, device=DEVICE, **options),
        torch.randn(3, 4, device=DEVICE, **options),
        torch.randint(9, (20,), device=DEVICE, **options),
        torch.randperm(20, device=DEVICE, **options),
        x.bernoulli(0.5, **options),
        x.normal_(**options),
        torch.multinomial(torch.full((9,), 0.5, device=DEVICE), 4, **options),
    ]


def test_manual_seed_repeats(core: Any) -> None:
    torch.manual_seed(5)
    first = [t.cpu() for t in _draws()]
    again = [t.cpu() for t in _draws()]
    torch.manual_seed(5)
    host = torch.rand(3)
    torch.manual_seed(5)
    queued = _draws()
    assert torch.equal(torch.rand(3), host)  # the CPU's generator is left alone
    core.synchronize(-1)
    for a, b, c in zip(first, queued, again, strict=True):
        assert torch.equal(a, b.cpu())
        assert not torch.equal(a, c)


def test_a_generator_of_ones_own(core: Any) -> None:
    generator = torch.Generator(device="sim")
    state = generator.manual_seed(3).get_state()
    first = [t.cpu() for t in _draws(generator=generator)]
    generator.set_state(state)
    for a, b in zip(first, _draws(generator=generator), strict=True):
        assert torch.equal(a, b.cpu())
    with pytest.raises(RuntimeError, match="'sim' device type for generator"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())


def test_dropout(core: Any) -> None:
    torch.manual_seed(1)
    x = torch.ones(400, device=DEVICE, requires_grad=True)
    y = F.dropout(x, 0.25)
    y.sum().backward()
    assert x.grad is not None
    kept = y.detach().cpu()
    assert torch.equal(kept, x.grad.cpu())
    assert torch.equal(kept.unique(), torch.tensor([0, 1 / 0.75]))
    assert 250 < (kept > 0).sum() < 350
    torch.manual_seed(1)
    assert torch.equal(F.dropout(torch.ones(400, device=DEVICE), 0.25).cpu(), kept)


# -- whole models ------------------------------------------------------------------------------------------------------


class ConvNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
        )
        self.head = torch.nn.Linear(72, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).flatten(1))


def _models() -> list[tuple[torch.nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        (ConvNet(), torch.randn(2, 3, 8, 8)),
        (torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(2, 5, 16)),
        (torch.nn.LSTM(6, 5, num_layers=2, bidirectional=True), torch.randn(4, 2, 6)),
        (torch.nn.GRU(6, 5), torch.randn(4, 2, 6)),
    ]


IDS = ["conv", "transformer", "lstm", "gru"]


@pytest.mark.parametrize("which", range(4), ids=IDS)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
def test_inference(core: Any, which: int, mode: str) -> None:
    model, x = _models()[which]
    model.eval()
    with getattr(torch, mode)():
        expected = model(x)
        model.to(DEVICE)
        core.synchronize(-1)
        got = model(x.to(DEVICE))
    assert not core.idle()
    _same(pytree.tree_map(lambda t: t.detach(), got), pytree.tree_map(lambda t: t.detach(), expected))


@pytest.mark.parametrize("which", [0, 1], ids=IDS[:2])
def test_training(core: Any, which: int) -> None:
    model, x = _models()[which]
    twin = _models()[which][0].to(DEVICE)
    for m, data in ((model, x), (twin, x.to(DEVICE))):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            m(data).square().mean().backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name].cpu(), value, msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", range(2), ids=IDS[:2])
def test_export(core: Any, which: int) -> None:
    model, x = _models()[which]
    model.eval()
    expected = model(x).detach()
    model.to(DEVICE)
    core.synchronize(-1)
    program = torch.export.export(model, (x.to(DEVICE),))
    got = program.module()(x.to(DEVICE))
    assert str(got.device) == DEVICE
    torch.testing.assert_close(got.detach().cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("run", "shapes"),
    [
        (lambda x, w, b: F.conv2d(x, w, b, padding=1), [(1, 2, 5, 5), (3, 2, 3, 3), (3,)]),
        (lambda x, w, b: F.conv_transpose2d(x, w, b), [(1, 2, 5, 5), (2, 3, 3, 3), (3,)]),
        (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(3, 4), (4,), (4,)]),
        (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 3), (4,), (4,)]),
        (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), [(5, 4), (4,), (4,)]),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), [(1, 2, 3, 4)] * 3),
        (lambda x, y: (x @ y).softmax(-1).cumsum(0), [(3, 4), (4, 3)]),
        (lambda x, y: torch.where(x > y, x, y * 2).sort(0)[0], [(3, 4), (3, 4)]),
        (lambda w: F.embedding(torch.tensor([1, 1, 3]).to(w.device), w), [(5, 3)]),
        (lambda w: F.embedding_bag(torch.tensor([[1, 1], [3, 0]]).to(w.device), w, mode="sum"), [(5, 3)]),
        (lambda w: F.embedding_bag(torch.tensor([[1, 1], [3, 0]]).to(w.device), w, mode="max"), [(5, 3)]),
        (lambda x: x[torch.tensor([0, 2]).to(x.device), 1:].amax(1), [(3, 4)]),
        (lambda x: F.max_pool2d(F.interpolate(x, scale_factor=2, mode="bilinear"), 2), [(1, 2, 4, 4)]),
        (lambda x, y: F.cross_entropy(x, torch.tensor([0, 2, 1]).to(x.device)) + y.prod(), [(3, 4), (3,)]),
        (lambda x: torch.linalg.inv(x @ x.mT + 3), [(3, 3)]),
    ],
)
def test_gradients(core: Any, run: Any, shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(2)
    host = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    device = [t.detach().to(DEVICE).requires_grad_() for t in host]
    weights = torch.randn(run(*host).shape, generator=generator)
    (run(*host) * weights).sum().backward()
    (run(*device) * weights.to(DEVICE)).sum().backward()
    for a, b in zip(host, device, strict=True):
        assert b.grad is not None
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-4, atol=1e-5)


def test_repr_and_save(core: Any) -> None:
    x = torch.arange(3.0).to(DEVICE) / 3
    assert repr(x) == "tensor([0.0000, 0.3333, 0.6667], device='sim:0')"
    assert repr(torch.ones(2, dtype=torch.int32, device="sim:1")) == "tensor([1, 1], device='sim:1', dtype=torch.int32)"
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, map_location="cpu")["x"], x.cpu())


def test_storages(core: Any) -> None:
    x = torch.arange(6.0).to(DEVICE)
    y = torch.empty(0, device=DEVICE).set_(x.untyped_storage(), 2, (2, 2), (2, 1))
    x.add_(1)
    assert y.tolist() == [[3, 4], [5, 6]]
    assert y.is_set_to(x[2:].view(2, 2))
    x.untyped_storage().resize_(8 * 4)
    assert x.tolist() == [1, 2, 3, 4, 5, 6]

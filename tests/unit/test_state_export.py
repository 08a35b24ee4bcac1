"""Programs of models that write: a call leaves in inputs and buffers what eager leaves there, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_of import Model
from torch import nn
from torch.nn import functional

import anabranch
from anabranch.export import AliasOutput, Cast, ComputedOutput, Program, Snapshot, export_program, finisher

pytestmark = pytest.mark.usefixtures("seeded")


def assert_same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    assert a.dtype is b.dtype, what
    assert a.shape == b.shape, what
    assert torch.equal(a, b), f"{what}: {a} is not {b}"


class Runner:
    """A program with its state, run as a plain graph, beside a copy of the model in eager."""

    def __init__(self, model: nn.Module, *inputs: Any, **options: Any) -> None:
        self.eager = copy.deepcopy(model)
        before = {k: v.clone() for k, v in model.state_dict(keep_vars=True).items()}
        given = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        self.program: Program = export_program(model, given, {}, **options)
        for k, v in model.state_dict(keep_vars=True).items():
            assert torch.equal(v, before[k]), f"export has written {k}"
        self.states = [s.initial.clone() for s in self.program.state]
        self.finish = finisher(self.program.outputs, self.program.structure)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        given = [x for x in inputs if isinstance(x, torch.Tensor)]
        with torch.no_grad():
            results = self.program.module(*self.program.weights, *given, *self.states)
            return self.finish(given, results)

    def check(self, *inputs: Any) -> Any:
        """One call of both, compared: results, inputs, buffers, and which results lie in an input's memory."""
        ours, theirs = ([x.clone() if isinstance(x, torch.Tensor) else x for x in inputs] for _ in range(2))
        before = [x._version for x in ours if isinstance(x, torch.Tensor)]
        made = self(*ours)
        with torch.no_grad():
            expected = self.eager(*theirs)
        a, b = (torch.utils._pytree.tree_leaves(x) for x in (made, expected))
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if not isinstance(x, torch.Tensor):
                assert x == y
                continue
            assert_same(x, y, f"output {i}")
            for p, q in zip(ours, theirs, strict=True):
                if isinstance(p, torch.Tensor):
                    shared = x.untyped_storage()._cdata == p.untyped_storage()._cdata
                    assert shared == (y.untyped_storage()._cdata == q.untyped_storage()._cdata), f"output {i}"
                    assert (x is p) == (y is q)
                    if shared:
                        assert (x.stride(), x.storage_offset()) == (y.stride(), y.storage_offset())
            assert not any(x.untyped_storage()._cdata == s.untyped_storage()._cdata for s in self.states)
        written = self.program.written
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            if isinstance(p, torch.Tensor):
                assert_same(p, q, f"input {i}")
        tensors = [x for x in ours if isinstance(x, torch.Tensor)]
        for i, (x, version) in enumerate(zip(tensors, before, strict=True)):
            assert (x._version > version) == (i in written), f"input {i}"
        buffers = dict(self.eager.named_buffers(remove_duplicate=False))
        names = {s.name for s in self.program.state}
        for state, x in zip(self.program.state, self.states, strict=True):
            assert_same(x, buffers[state.name], f"state {state.name}")
        assert names.isdisjoint(self.program.weight_names)
        self._check_form()
        return made

    def _check_form(self) -> None:
        graph = self.program.module.graph
        placeholders = graph.find_nodes(op="placeholder")
        weights = len(self.program.weights)
        assert len(self.program.weight_names) == len(self.program.requires_grad) == weights
        tensors = placeholders[weights:]
        nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        end = nodes[len(nodes) - len(self.program.written) :]
        assert all(n.target is torch.ops.aten.copy_.default for n in end)
        assert {n.args[0] for n in end} == {tensors[i] for i in self.program.written}
        rest = nodes[: len(nodes) - len(end)]
        assert not any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in rest)


def check(model: Any, *inputs: Any, calls: int = 3, **options: Any) -> Runner:
    """``calls`` calls in a row, with other values each."""
    runner = Runner(model if isinstance(model, nn.Module) else Model(lambda self, *a: model(*a)), *inputs, **options)
    for scale in range(1, calls + 1):
        runner.check(*(x * scale if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs))
    return runner


def refused(model: Any, *inputs: Any, match: str, **options: Any) -> None:
    made = model if isinstance(model, nn.Module) else Model(lambda self, *a: model(*a))
    with pytest.raises(anabranch.UnsupportedModel, match=match):
        export_program(made, inputs, {}, **options)


def alias(runner: Runner, i: int = 0) -> AliasOutput:
    output = runner.program.outputs[i]
    assert isinstance(output, AliasOutput)
    return output


# -- inputs -----------------------------------------------------------------------------------------------------------


def with_pos(x: torch.Tensor, pos: torch.Tensor, k: torch.Tensor) -> Any:
    x[:, pos] = k
    return x.sum()


def views(x: torch.Tensor) -> Any:
    y = x.view(-1)
    y.add_(1)
    return y, x[0], x.t(), x


def old_and_new(x: torch.Tensor) -> Any:
    view, double, old = x.view(-1), x * 2, x.clone()
    x.mul_(3)
    return view, double, old, x + 1


def two_views(x: torch.Tensor) -> Any:
    x[0].add_(1)
    x[:, 1].mul_(2)
    x.t()[2].zero_()
    return x.sum()


def equal_values(x: torch.Tensor) -> Any:
    y = torch.tanh(x)
    x.copy_(y)
    return y


@pytest.mark.parametrize(
    ("fn", "inputs"),
    [
        (lambda x: x.add_(1), 1),
        (lambda x: functional.relu_(x), 1),
        (lambda x: x.mul_(2).view(-1), 1),
        (views, 1),
        (old_and_new, 1),
        (two_views, 1),
        (equal_values, 1),
        (lambda x, y: (x.copy_(y), y.add_(x))[1][0], 2),
        (lambda x, y: (x.copy_(y), y + 1), 2),
        (lambda x, y: torch.add(x, y, out=x), 2),
        (lambda x: x.chunk(3)[1].add_(1), 1),
        (lambda x: (x.chunk(3)[1].add_(1), x.unbind(1)[2]), 1),
        (lambda x: x.exp_().narrow(1, 1, 2).select(0, 1), 1),
        (lambda x: x.detach().sin_(), 1),
        (lambda x: (x.sigmoid_(), x.reshape(-1), x.contiguous(), x.to(torch.float32)), 1),
        (lambda x: x.t().copy_(torch.ones(4, 3)).unsqueeze(0), 1),
        (lambda x: x.masked_fill_(x > 0, 0.5).sum(), 1),
        (lambda x: x.as_strided((3,), (4,), 0).zero_(), 1),
        (lambda x: {"same": x.add_(1), "twice": x, "view": [x[1:]]}, 1),
    ],
)
def test_an_input_that_is_written(fn: Callable[..., Any], inputs: int) -> None:
    check(fn, *(torch.randn(3, 4) for _ in range(inputs)))


def test_results_in_a_written_inputs_memory_are_taken_of_the_callers_tensor() -> None:
    runner = check(views, torch.randn(3, 4))
    assert all(isinstance(o, AliasOutput) for o in runner.program.outputs)
    assert alias(runner, 3).view is None
    assert runner.program.written == {0}
    runner = check(equal_values, torch.randn(3, 4))
    assert isinstance(runner.program.outputs[0], ComputedOutput)


def test_caches_that_are_inputs() -> None:
    cache, k = torch.zeros(2, 8, 4), torch.randn(2, 1, 4)
    runner = check(lambda c, pos, k: c.index_copy_(1, pos, k).sum(), cache, torch.tensor([5]), k)
    assert runner.program.written == {0}
    check(with_pos, cache, torch.tensor([3, 1]), torch.randn(2, 2, 4))
    check(lambda c, pos, k: c.scatter_(1, pos.view(1, 1, 1).expand(2, 1, 4), k), cache, torch.tensor(5), k)


def test_what_is_written_back_unchanged_is_not_written() -> None:
    runner = check(lambda x: x.transpose(0, 1).transpose(0, 1) + 1, torch.randn(3, 4))
    assert not runner.program.written


def test_a_written_input_that_is_not_dense() -> None:
    x = torch.randn(4, 10)[:, 2:7]
    runner = Runner(Model(lambda self, x: x.add_(1) * 2), x)
    runner.check(torch.randn(4, 5))
    assert runner.program.written == {0}
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    check(lambda x: x.triu_()[0], x)
    refused(lambda x: x.add_(1), torch.randn(1, 5).expand(3, 5), match="one place in memory stands for several")
    refused(lambda x: x.add_(1), torch.randn(9).as_strided((3, 4), (2, 1)), match=r"writes input 0, of which one place")


def test_sizes_that_vary() -> None:
    x = torch.randn(5, 4)
    runner = Runner(
        Model(lambda self, x, y: (x.add_(y), x.view(-1), y * x.shape[0])), x, torch.randn(4), free=frozenset({(0, 0)})
    )
    assert runner.program.sizes is not None
    runner.program.sizes.settle()
    assert runner.program.sizes.free == {(0, 0)}
    for n in (5, 3, 7):
        runner.check(torch.randn(n, 4), torch.randn(4))


# -- state ------------------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    def __init__(self, how: str, n: int = 4) -> None:
        super().__init__()
        self.how = how
        self.lin = nn.Linear(2 * n, n)
        self.register_buffer("h", torch.zeros(3, n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = torch.tanh(self.lin(torch.cat([x, self.h], 1)))
        if self.how == "copy":
            self.h.copy_(new)
        elif self.how == "slice":
            self.h[:] = new
        else:
            self.h = new
        return self.h


class Stream(nn.Module):
    """A causal convolution over chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)
        self.register_buffer("context", torch.zeros(1, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.context, x], 2)
        self.context.copy_(x[:, :, -2:])
        return self.conv(x)


class Ring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("buf", torch.zeros(4, 3))
        self.register_buffer("pos", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.buf.index_copy_(0, self.pos, x)
        self.pos.add_(1).remainder_(4)
        return self.buf.mean(0)


class Attention(nn.Module):
    """One step of a decoder with a cache of fixed length."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, 2, 6, 4))
        self.register_buffer("ids", torch.arange(6))

    def forward(self, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.view(1, 1, 2, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        self.k_cache.index_copy_(2, pos, k)
        self.v_cache.index_copy_(2, pos, v)
        mask = (self.ids <= pos)[None, None, None]
        return functional.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask)


@pytest.mark.parametrize("how", ["copy", "slice", "assign"])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_recurrent_cell(how: str, depth: int) -> None:
    model: nn.Module = Cell(how)
    for _ in range(depth):
        model = nn.Sequential(model, nn.Linear(4, 4))
    runner = check(model, torch.randn(3, 4))
    name = "0." * depth + "h"
    (state,) = runner.program.state
    assert state.name == name
    assert state.initial.data_ptr() == model.get_buffer(name).data_ptr()
    assert runner.program.written == {1}
    assert not state.hint
    if not depth:
        assert isinstance(runner.program.outputs[0], ComputedOutput)
        assert runner.program.notes == ("output 0 is the state 'h': a copy of it is returned",)
    else:
        assert not runner.program.notes


@pytest.mark.parametrize(
    ("make", "inputs", "written"),
    [
        (Stream, (torch.randn(1, 2, 5),), {1}),
        (Ring, (torch.randn(1, 3),), {1, 2}),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (torch.randn(5, 3),), {1, 2, 3}),
        (lambda: nn.InstanceNorm1d(4, track_running_stats=True), (torch.randn(2, 4, 3),), None),
    ],
)
def test_models_with_state(make: Any, inputs: Any, written: Any) -> None:
    runner = check(make(), *inputs, calls=6)
    if written is not None:
        assert runner.program.written == written


def test_a_decoder_step() -> None:
    runner = Runner(Attention(), torch.randn(1, 1, 8), torch.tensor([0]))
    assert [s.name for s in runner.program.state] == ["k_cache", "v_cache"]
    assert "ids" in runner.program.weight_names
    for i in range(6):
        runner.check(torch.randn(1, 1, 8), torch.tensor([i]))


def test_training_mode_of_a_norm_has_a_hint() -> None:
    runner = check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(), torch.randn(2, 3, 5, 5))
    assert [s.name for s in runner.program.state] == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert all(s.hint == "Call model.eval() first if that was not meant." for s in runner.program.state)


def ema(self: Any, x: torch.Tensor) -> Any:
    self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
    self.var.lerp_(x.var(0), 0.1)
    return (x - self.mean) / self.var.sqrt()


def before_and_after(self: Any, x: torch.Tensor) -> Any:
    a = self.h * 2
    view = self.h[0]
    self.h.add_(x)
    return a, self.h * 2, view


def old_of_assigned(self: Any, x: torch.Tensor) -> Any:
    old = self.h
    self.h = old + x
    return old, old[0], self.h[:1], self.h


def swapped(self: Any, x: torch.Tensor) -> Any:
    self.h, self.g = self.g, self.h
    return self.h + x


def assigned_twice(self: Any, x: torch.Tensor) -> Any:
    self.h = self.h + x
    self.h = self.h * 2
    return self.h + 1


def shifted(self: Any, x: torch.Tensor) -> Any:
    self.h[:, :-1] = self.h[:, 1:].clone()
    self.h[:, -1] = x[:, 0]
    return self.h.sum()


def written_views(self: Any, x: torch.Tensor) -> Any:
    self.h.narrow(1, 1, 2).select(0, 1).fill_(3.0)
    self.h.t().copy_(self.h.t() * 2 + x.t())
    return self.h.t(), self.h.view(-1)[2:]


def twice(self: Any, x: torch.Tensor) -> Any:
    self.h.add_(x)
    return self.h, self.h, x


def previous(self: Any, x: torch.Tensor) -> Any:
    d = x - self.h
    self.h = x
    return d


def written_and_assigned_input(self: Any, x: torch.Tensor) -> Any:
    self.h = self.h + x
    x.add_(self.h)
    return x[0]


def turned(self: Any, x: torch.Tensor) -> Any:
    self.s = self.s.t()
    return self.s + x[:, :3]


@pytest.mark.parametrize(
    "fn",
    [
        before_and_after,
        old_of_assigned,
        swapped,
        assigned_twice,
        shifted,
        written_views,
        twice,
        previous,
        written_and_assigned_input,
        turned,
        lambda self, x: self.h.copy_(torch.roll(torch.cat([self.h[:, 1:], x[:, :1]], 1), 1, 0)).sum(),
        lambda self, x: self.h.copy_(x),
        lambda self, x: (self.n.add_(1), x * self.n)[1],
        lambda self, x: (self.h.copy_(self.g), self.g.copy_(self.h + x))[1] * 1,
        lambda self, x: self.h.add_(x),
        lambda self, x: (self.h.data.add_(x), self.h * 1)[1],
        lambda self, x: (self.h.copy_(x.double()), self.h + 1)[1],
        lambda self, x: (self.h.copy_(x[0]), self.h + 1)[1],
        lambda self, x: (self.s.copy_(x[:, :3].t()), self.s.view(-1) * 1, self.s)[1:],
        lambda self, x: (self.h.copy_(x), x.add_(1), self.h.view(-1))[1:],
        lambda self, x: (self.h.index_put_((torch.tensor([1]),), x[:1]))[1],
        lambda self, x: torch.mul(x, 2, out=self.h)[0],
        lambda self, x: self.h.addmm_(x, x[:, :3].new_ones(4, 4)) + 1,
        lambda self, x: torch.stack([self.h.add_(i) for i in range(3)]),
        lambda self, x: (setattr(self, "h", self.h.to(torch.float32)), self.h + x)[1],
    ],
    ids=lambda fn: fn.__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_writes_into_buffers(fn: Callable[..., Any], dtype: torch.dtype) -> None:
    if dtype is torch.float16 and fn.__name__ == "<lambda>":
        pytest.skip("one type is enough")
    model = Model(
        fn,
        h=torch.randn(3, 4).to(dtype),
        g=torch.randn(3, 4).to(dtype),
        n=torch.zeros((), dtype=torch.long),
        s=torch.randn(3, 3).to(dtype),
    )
    runner = check(model, torch.randn(3, 4).to(dtype), calls=4)
    assert runner.program.state or "setattr" in str(fn.__code__.co_names)


def test_ema() -> None:
    check(Model(ema, mean=torch.zeros(4), var=torch.ones(4)), torch.randn(6, 4), calls=4)


def test_random_state() -> None:
    def noisy(self: Any, x: torch.Tensor) -> Any:
        self.h.normal_()
        return self.h + x

    model = Model(noisy, h=torch.zeros(3))
    program = export_program(model, [torch.randn(3)], {})
    assert program.is_random
    assert program.written == {1}
    assert not model.h.any()


def test_a_counter_kept_by_augmented_assignment() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.n += 1
            return x * self.n

    check(Counter(), torch.randn(3))


def test_one_buffer_of_two_names_is_one_state() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Module(), nn.Module()
            h = torch.zeros(3)
            self.a.register_buffer("h", h)
            self.b.register_buffer("h", h)

        def forward(self, x: torch.Tensor) -> Any:
            self.a.h.add_(x)
            self.b.h.mul_(2)
            return self.a.h + 1, self.b.h * 1

    runner = check(Tied(), torch.randn(3))
    assert [s.name for s in runner.program.state] == ["a.h"]


def test_state_that_another_program_writes() -> None:
    def fn(self: Any, x: torch.Tensor) -> Any:
        if x.shape[0] > 1:
            self.h.copy_(x[-1])
            return x + self.g
        return x + self.h, self.h

    model = Model(fn, h=torch.zeros(4), g=torch.ones(4))
    prefill = check(model, torch.randn(5, 4))
    assert [s.name for s in prefill.program.state] == ["h"]
    step = check(model, torch.randn(1, 4), state=frozenset({"h", "g"}))
    assert [s.name for s in step.program.state] == ["h"]
    assert not step.program.written
    assert isinstance(step.program.outputs[1], ComputedOutput)
    assert step.program.notes == ("output 1 is the state 'h': a copy of it is returned",)
    assert [s.name for s in check(model, torch.randn(1, 4)).program.state] == []


def test_sizes_that_vary_beside_state() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("h", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> Any:
            self.h.add_(x.sum(0))
            return x + self.h

    runner = Runner(Sum(), torch.randn(5, 4), free=frozenset({(0, 0)}))
    assert runner.program.sizes is not None
    runner.program.sizes.settle()
    assert runner.program.sizes.free == {(0, 0)}
    assert not runner.program.sizes.refuses([(9, 4)])
    for n in (5, 2, 9):
        runner.check(torch.randn(n, 4))


def test_an_index_that_is_a_tensor_of_no_dimensions() -> None:
    def fn(self: Any, x: torch.Tensor, pos: torch.Tensor, k: torch.Tensor) -> Any:
        self.h[:, pos] = k
        x[pos] = 2
        x[..., pos, :] = k[0]
        x[None, :, pos] = k[:, None].sum(1)
        self.h[1, pos] = k.half()[0]
        self.h[1, ..., pos] = x.sum()
        return self.h.sum() + x.sum()

    model = Model(fn, h=torch.zeros(3, 4, 2))
    runner = Runner(model, torch.randn(3, 3, 2), torch.tensor(0), torch.randn(3, 2))
    for i in (1, 0, -1):
        given = torch.randn(3, 3, 2), torch.tensor(i), torch.randn(3, 2)
        with torch.no_grad():
            assert not runner.program.data_dependent
        if i < 1:
            runner.check(*given)


# -- what is refused --------------------------------------------------------------------------------------------------


class Holds(nn.Module):
    """A model with a tensor that is no buffer."""

    def __init__(self, fn: Callable[..., Any], held: Any) -> None:
        super().__init__()
        self.fn, self.held = fn, held

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(self, x)


def assigned(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = x + self.held
    self.held = y
    return y


def assigned_in_a_list(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = x + self.held[0]
    self.held[0] = y
    return y


def filled(self: Any, x: torch.Tensor) -> torch.Tensor:
    if self.held is None:
        self.held = torch.zeros(3)
    self.held = self.held + x
    return self.held


@pytest.mark.parametrize(
    ("fn", "held", "name"),
    [
        (assigned, torch.zeros(3), "held"),
        (assigned_in_a_list, [torch.zeros(3)], r"held\[0\]"),
        (filled, None, "held"),
        (lambda self, x: self.held.add_(x) * 2, torch.zeros(3), "held"),
    ],
)
def test_a_tensor_that_is_no_buffer(fn: Callable[..., Any], held: Any, name: str) -> None:
    refused(Holds(fn, held), torch.randn(3), match=rf"changes '{name}' from call to call.*register_buffer")


def test_a_tensor_that_is_filled_once_or_only_written_is_no_state() -> None:
    def once(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.held is None:
            self.held = torch.arange(3.0)
        return x + self.held

    def noted(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.held = x * 2
        return self.held + 1

    for fn in (once, noted):
        assert not check(Holds(fn, None), torch.randn(3)).program.state


def test_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_pre_hook(lambda module, args: (module.bias.data.add_(1), None)[1])
    refused(model, torch.randn(3), match=r"writes its parameter '0\.bias'.*register_buffer")


def test_a_buffer_that_grows_or_changes_its_type() -> None:
    def grows(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.h = torch.cat([self.h, x])
        return self.h

    def halves(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.h = x.half()
        return self.h

    x = torch.randn(2, 4)
    refused(
        Model(grows, h=torch.zeros(0, 4)), x, match=r"float32\[4, 4\] on cpu to its buffer 'h', which is .*\[2, 4\]"
    )
    refused(Model(halves, h=torch.zeros(2, 4)), x, match=r"float32\[2, 4\]|float16\[2, 4\] on cpu to its buffer")

    def wide(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.h = x[0]
        return x

    refused(Model(wide, h=torch.zeros(2, 4)), x, match="state keeps its shape")


def test_a_buffer_that_was_none() -> None:
    def fn(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.h is None:
            self.h = torch.zeros(3)
        self.h = self.h + x
        return x

    model = Model(fn)
    model.register_buffer("h", None)
    refused(model, torch.randn(3), match="'h', which was None when it was compiled")


def test_buffers_that_share_memory() -> None:
    def fn(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.h.add_(x)
        return self.g + 1

    g = torch.zeros(4, 4)
    for h in (g[:3], g.detach()[:3], g.view(-1)[4:].view(3, 4)):
        refused(Model(fn, h=h, g=g), torch.randn(3, 4), match="'h', which shares memory with 'g'")
    model = Model(fn, h=g, g=torch.zeros(4, 4))
    model.rows = list(g)
    refused(model, torch.randn(4, 4), match="'h', which shares memory with another tensor")
    refused(Model(fn, h=torch.zeros(3, 8)[:, ::2], g=g), torch.randn(3, 4), match="not dense")
    check(Model(fn, h=torch.zeros(4, 3).t(), g=g), torch.randn(3, 4))

    def shared(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.h.mul_(2)
        y = self.h + x
        self.h = x
        return y

    refused(Model(shared, h=torch.zeros(3)), torch.randn(3), match="assigns an input to its buffer 'h' and also writes")


def test_state_of_pythons_beside_a_buffer() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("buf", torch.zeros(8, 4))
            self.pos = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.buf[self.pos] = x
            self.pos += 1
            return self.buf.sum(0)

    model = Counts()
    refused(model, torch.randn(4), match=r"state of Python's: a call changes self\.pos")
    assert model.pos == 0
    assert not model.buf.any()


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda self, x: self.h.resize_(6) + 1, "changes the shape or the memory of its 'h' in place"),
        (lambda self, x: self.h.unsqueeze_(0) + 1, "changes the shape or the memory of its 'h' in place"),
        (lambda self, x: setattr(self.h, "data", x), r"\.data of a tensor"),
    ],
)
def test_other_changes_of_a_buffer(fn: Callable[..., Any], match: str) -> None:
    refused(Model(lambda self, x: (fn(self, x), x + 1)[1], h=torch.zeros(3)), torch.randn(3), match=match)


def test_inputs_that_cannot_be_written() -> None:
    z = torch.randn(3, dtype=torch.complex64)
    refused(lambda x: x.add_(1), z.conj(), match=r"input 0, which is a lazy conjugate.*Call resolve_conj\(\)")
    refused(lambda x: x.add_(1), z.conj().imag, match=r"input 0, which is a lazy negative.*Call resolve_neg\(\)")
    check(lambda x, y: x.add_(y), z, z.conj())


def test_views_that_cannot_be_taken_of_the_callers_tensor() -> None:
    def by_value(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x[i.item() :]

    refused(by_value, torch.randn(3), torch.tensor(1), match=r"writes input 0 and returns a part of it")


def test_writes_that_a_recorded_graph_does_not_show() -> None:
    def added(x: torch.Tensor) -> Any:
        return torch.func.vmap(lambda a, b: a.add_(b))(x, x * 2)

    refused(added, torch.randn(3, 4), match=r"writes input 0 within a transform of torch\.func")

    def with_grad(self: Any, x: torch.Tensor) -> Any:
        with torch.enable_grad():
            x.add_(1)
            self.h.add_(x)
            return x.view(-1)

    check(Model(with_grad, h=torch.zeros(3, 4)), torch.randn(3, 4))


def test_half_precision() -> None:
    def fn(self: Any, x: torch.Tensor) -> Any:
        y = self.lin(x)
        self.h.copy_(y)
        self.g = y + self.g
        self.k = y
        self.n += 1
        self.h.addmm_(y, self.lin.weight)
        return self.h + self.k, self.k

    buffers = {name: torch.zeros(3, 4) for name in "hgk"}
    model = Model(fn, **buffers, n=torch.tensor(0))
    model.lin = nn.Linear(4, 4)
    snapshot = Snapshot.of(model)
    program = export_program(snapshot, [torch.randn(3, 4)], {}, Cast(snapshot, torch.float16))
    assert {s.name: s.initial.dtype for s in program.state} == {
        **dict.fromkeys("hgk", torch.float32),
        "n": torch.int64,
    }
    assert program.written == {1, 2, 3, 4}
    eager, states = copy.deepcopy(model), [s.initial.clone() for s in program.state]
    for _ in range(3):
        x = torch.randn(3, 4)
        with torch.no_grad():
            made = finisher(program.outputs, program.structure)([x], program.module(*program.weights, x, *states))
            expected = eager(x)
        for a, b in zip(made, expected, strict=True):
            assert a.dtype is b.dtype
            torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
        for s, a in zip(program.state, states, strict=True):
            torch.testing.assert_close(a, eager.get_buffer(s.name), atol=0.05, rtol=0.05)

    def adds(self: Any, x: torch.Tensor) -> Any:
        x.add_(1)
        return self.lin(x)

    model = Model(adds)
    model.lin = nn.Linear(4, 4)
    snapshot = Snapshot.of(model)
    with pytest.raises(
        anabranch.UnsupportedModel, match=r"precision=torch\.float16 given, and the model writes input 0"
    ):
        export_program(snapshot, [torch.randn(3, 4)], {}, Cast(snapshot, torch.float16))


def test_of_several_pieces_the_last_that_reads_an_input_writes_it() -> None:
    from anabranch.export import TensorSpec, cut

    def model(self: Any, x: torch.Tensor) -> torch.Tensor:
        old = self.h * 2 + x.exp().sin()
        self.h.copy_(old.tanh())
        noise = torch.rand_like(x) + self.n
        return old.cos() + noise.sin().exp() * self.k + self.h

    buffers = {"h": torch.zeros(3), "n": torch.zeros(3), "k": torch.ones(3)}
    program = export_program(Model(model, **buffers), [torch.randn(3)], {}, state=frozenset("k"))
    made = cut(program, [TensorSpec.of(torch.randn(3))] * (1 + len(program.state)), torch.device("cpu"))
    assert not isinstance(made, str)
    assert [s.name for s in program.state] == ["h", "k"]
    writing = [[piece.takes[i] for i in piece.program.written] for piece in made.pieces]
    assert writing == [[1], [], []], "the new value is there in the first piece, and no later one reads the old one"


def test_indices_of_state_are_not_looked_at() -> None:
    from anabranch.export import TensorSpec, valid_integer

    def fn(self: Any, ids: torch.Tensor) -> torch.Tensor:
        self.pos.add_(1)
        return self.table[ids - 1] + self.table[self.pos]

    model = Model(fn, pos=torch.tensor([2]), table=torch.randn(9, 3))
    ids = torch.tensor([1, 2])
    runner = Runner(model, ids)
    assert valid_integer(runner.program.module.graph, [TensorSpec.of(ids)]) == (0, "")
    runner.check(ids)


def test_what_an_assignment_leaves_holds_no_tensor_of_the_trace() -> None:
    runner = check(nn.Sequential(Cell("assign"), nn.Linear(4, 4)), torch.randn(3, 4))
    assert not any("puts tensors into" in note for note in runner.program.notes)
    model = Model(swapped, h=torch.ones(3), g=torch.zeros(3))
    assert check(model, torch.randn(3)).program.written == {1, 2}

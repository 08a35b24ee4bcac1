"""The plan as plain data: what it says, how it is saved and drawn, and what it refuses to be."""

from __future__ import annotations

import dataclasses
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anabranch
from anabranch.export import Signature, export_program, flatten_call
from anabranch.plan import Access, Buffer, Edge, Plan, Step
from anabranch.plan._plan import human_bytes
from anabranch.plan._planner import build_plan, uses_workspace

pytestmark = pytest.mark.usefixtures("seeded")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        h = self.linear(x)
        return torch.relu(h).t(), h + y


class Fn(nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


def plan_of(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> Plan:
    program = export_program(model.eval(), inputs, {})
    signature = Signature.of(*flatten_call(inputs, {}))
    options = {"device": "cpu", "backend": "eager", "captured": False, **options}
    device = torch.device(options.pop("device"))
    return build_plan(
        program, signature.tensors, name="net", device=device, reason="a test", notes={"note": "text"}, **options
    )


def two_lanes() -> Plan:
    return Plan(
        name='two <lanes> & a "name"',
        device="cuda:0",
        backend="eager",
        lanes=("main", "side"),
        buffers=(
            Buffer("input 0", 48, "input", dtype="float32", shape=(3, 4)),
            Buffer("a", 48, block="heap", offset=0),
            Buffer("b", 48, block="heap", offset=64),
            Buffer("output 0", 48, "output"),
        ),
        steps=(
            Step("fork", "main", (Access("input 0"),), (Access("a"),), "op", "aten.relu", "net.py:3"),
            Step("branch", "side", (Access("input 0"),), (Access("b", 0, 24),), "kernels", "x < y"),
            Step("join", "main", (Access("a"), Access("b", 0, 24)), (Access("output 0"),), "copy"),
        ),
        edges=(Edge("branch", "join"),),
        captured=True,
        reason="asked for",
        notes={"graph path, us a call": "12.5"},
    )


# -- saving, printing, drawing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [two_lanes, lambda: plan_of(Net(), torch.randn(2, 3), torch.randn(2, 4))])
def test_json_gives_an_equal_plan_back(make: Callable[[], Plan]) -> None:
    plan = make()
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again is not plan
    assert Plan.from_json(again.to_json()).to_json() == plan.to_json()
    assert isinstance(again.buffers[0].shape, tuple)


def test_json_of_a_broken_plan_is_refused() -> None:
    text = two_lanes().to_json().replace('"lane": "side"', '"lane": "nowhere"')
    with pytest.raises(ValueError, match="'nowhere' is not one of main, side"):
        Plan.from_json(text)


def test_printing_shows_steps_accesses_waits_sources_and_totals() -> None:
    text = str(two_lanes())
    lines = text.splitlines()
    assert lines[0].endswith("cuda:0, eager, captured (asked for)")
    assert "lanes: main, side" in text
    join = next(line for line in lines if "join" in line and "[main]" in line)
    assert "reads a, b[0:24]; writes output 0" in join
    assert "waits for branch" in join
    assert "# net.py:3" in text
    assert "1 input (48 B), 2 temporary (96 B), 1 output (48 B)" in text
    assert "graph path, us a call: 12.5" in text


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")],
)
def test_bytes_for_people(n: int, text: str) -> None:
    assert human_bytes(n) == text


def test_the_picture_is_xml_with_a_box_a_step_and_an_arrow_an_edge(tmp_path: Path) -> None:
    plan = two_lanes()
    path = plan.draw(tmp_path / "plan.svg")
    assert path == tmp_path / "plan.svg"
    root = ET.parse(path).getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg"
    assert len(root.findall(f"{svg}g")) == len(plan.steps)
    arrows = [line for line in root.findall(f"{svg}line") if line.get("marker-end")]
    assert len(arrows) == 1
    titles = [g.findtext(f"{svg}title") for g in root.findall(f"{svg}g")]
    assert titles[1] is not None
    assert "reads input 0" in titles[1]
    assert "x < y" in titles[1]
    assert plan.name in [t.text for t in root.findall(f"{svg}text")]
    # Boxes of two lanes stand in two columns; time goes down.
    boxes = [g.find(f"{svg}rect") for g in root.findall(f"{svg}g")]
    xs, ys = [b.get("x") for b in boxes if b is not None], [int(b.get("y", "")) for b in boxes if b is not None]
    assert xs[0] == xs[2] != xs[1]
    assert ys == sorted(set(ys))


def test_a_real_engines_plan_can_be_drawn_and_printed(tmp_path: Path) -> None:
    engine = anabranch.compile(Net().eval(), [torch.randn(2, 3), torch.randn(2, 4)], backend="eager")
    ET.parse(engine.plan.draw(str(tmp_path / "p.svg")))
    assert "aten.linear.default" in str(engine.plan)
    assert "Net(float32[2, 3], float32[2, 4])" in str(engine.plan)


def test_an_empty_plan_can_be_drawn_and_printed(tmp_path: Path) -> None:
    plan = Plan("empty", "cpu", "eager", (), (), ())
    ET.parse(plan.draw(tmp_path / "p.svg"))
    assert "buffers: none" in str(plan)


def test_plans_need_no_pytorch(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_python(
        """
        import sys
        from anabranch.plan._plan import Plan
        plan = Plan("p", "cuda", "eager", ("main",), (), ())
        assert Plan.from_json(plan.to_json()) == plan and str(plan)
        print("torch" in sys.modules)
        """
    )
    assert done.stdout.strip() == "False", done.stderr


# -- what a plan may not be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "scratch"}, "kind is 'scratch', expected one of input"),
        ({"nbytes": -1}, "must not be negative"),
        ({"offset": -8}, "must not be negative"),
    ],
)
def test_a_buffer_must_make_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        Buffer(**{"name": "b", "nbytes": 4, **options})
    assert "'b'" in str(info.value)


def test_a_buffer_alone_in_its_block_is_its_own_location() -> None:
    assert Buffer("b", 4).location == "b"
    assert Buffer("b", 4, block="heap").location == "heap"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"buffers": (*p.buffers, p.buffers[0])}, "buffer names are not unique"),
        (lambda p: {"steps": (*p.steps, p.steps[0])}, "step names are not unique"),
        (lambda p: {"lanes": ("main",)}, "'branch': lane 'side' is not one of main"),
        (lambda p: {"buffers": p.buffers[1:]}, "'fork': buffer 'input 0' is not in the plan"),
        (lambda p: {"buffers": p.buffers[:-1]}, "'join': buffer 'output 0' is not in the plan"),
        (lambda p: {"edges": (Edge("branch", "end"),)}, "'branch' -> 'end': step 'end' is not in the plan"),
        (lambda p: {"edges": (Edge("begin", "join"),)}, "step 'begin' is not in the plan"),
        (lambda p: {"edges": (Edge("join", "branch"),)}, "a wait must be issued after its record"),
        (lambda p: {"edges": (Edge("join", "join"),)}, "a wait must be issued after its record"),
    ],
)
def test_a_plan_must_be_consistent(change: Callable[[Plan], dict[str, Any]], message: str) -> None:
    plan = two_lanes()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan, **change(plan))


# -- what the builder says --------------------------------------------------------------------------------------------


def names(accesses: tuple[Access, ...]) -> list[str]:
    return [a.buffer for a in accesses]


def test_an_eager_plan_lists_each_operator_with_its_reads_and_writes() -> None:
    plan = plan_of(Net(), torch.randn(2, 3), torch.randn(2, 4))
    table = [(s.kind, s.op, names(s.reads), names(s.writes)) for s in plan.steps]
    weights = ["weight linear.weight", "weight linear.bias"]
    assert table == [
        ("op", "aten.linear.default", ["input 0", *weights], ["%linear"]),
        ("op", "aten.relu.default", ["%linear"], ["%relu"]),
        ("view", "aten.t.default", [], []),
        ("op", "aten.add.Tensor", ["%linear", "input 1"], ["output 1"]),
    ]
    sizes = {b.name: (b.kind, b.nbytes, b.shape, b.dtype) for b in plan.buffers}
    assert sizes == {
        "weight linear.weight": ("weight", 48, (4, 3), "float32"),
        "weight linear.bias": ("weight", 16, (4,), "float32"),
        "input 0": ("input", 24, (2, 3), "float32"),
        "input 1": ("input", 32, (2, 4), "float32"),
        "%linear": ("temporary", 32, (2, 4), "float32"),
        "%relu": ("temporary", 32, (2, 4), "float32"),
        "output 1": ("output", 32, (2, 4), "float32"),
    }
    assert plan.steps[0].source.startswith("test_plan.py:") or "linear" in plan.steps[0].source
    assert (plan.captured, plan.reason, plan.notes, plan.lanes) == (False, "a test", {"note": "text"}, ("main",))


def test_a_reader_of_one_result_of_several_reads_that_one() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.topk(2)[0] * 2

    plan = plan_of(Fn(fn), torch.randn(3, 5))
    topk = next(s for s in plan.steps if "topk" in s.op)
    mul = next(s for s in plan.steps if "mul" in s.op)
    assert len(topk.writes) == 2
    assert names(mul.reads) == [names(topk.writes)[0]]
    sizes = {b.name: (b.nbytes, b.dtype) for b in plan.buffers}
    assert [sizes[n] for n in names(topk.writes)] == [(24, "float32"), (48, "int64")]


def test_parts_of_a_split_read_the_tensor_that_was_split() -> None:
    plan = plan_of(Fn(lambda x: [part + 1 for part in (x * 2).split(2)]), torch.randn(6, 3))
    assert [names(s.reads) for s in plan.steps if "add" in s.op] == [["%mul"]] * 3


def test_a_compiled_backends_kernels_are_one_step() -> None:
    plan = plan_of(Net(), torch.randn(2, 3), torch.randn(2, 4), backend="inductor")
    (step,) = plan.steps
    assert step.kind == "kernels"
    assert step.op == "inductor: 4 ops"
    assert names(step.reads) == ["weight linear.weight", "weight linear.bias", "input 0", "input 1"]
    assert names(step.writes) == ["output 0", "output 1"]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_captured_plan_copies_in_first_and_out_last(backend: str) -> None:
    model = Fn(lambda x, y: (x * 2 + y, y - 1))
    plan = plan_of(model, torch.randn(2, 4), torch.randn(2, 4), backend=backend, device="cuda", captured=True)
    first, last = plan.steps[:2], plan.steps[-2:]
    assert [(s.kind, names(s.reads), names(s.writes)) for s in first] == [
        ("copy", ["input 0"], ["static input 0"]),
        ("copy", ["input 1"], ["static input 1"]),
    ]
    assert [(s.kind, names(s.reads), names(s.writes)) for s in last] == [
        ("copy", ["static output 0"], ["output 0"]),
        ("copy", ["static output 1"], ["output 1"]),
    ]
    kind = {b.name: b.kind for b in plan.buffers}
    for step in plan.steps[2:-2]:
        touched = {kind[n] for n in names(step.reads) + names(step.writes)}
        assert touched <= {"static", "temporary"}, "what is captured must not touch the caller's memory"
    assert plan.captured


def test_a_step_that_uses_a_workspace_writes_it_on_cuda() -> None:
    def writers(device: str) -> list[str]:
        plan = plan_of(Net(), torch.randn(2, 3), torch.randn(2, 4), device=device)
        return [s.op for s in plan.steps if "workspace main" in names(s.writes)]

    assert writers("cuda") == ["aten.linear.default"]
    assert writers("cpu") == []


# Its name holds that of an op which needs no workspace, and says nothing.
@torch.library.custom_op("anabranch_test::conv_then_matmul", mutates_args=())
def unknown(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@unknown.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


CONV_NET = nn.Sequential(
    nn.Conv2d(3, 8, 3),
    nn.BatchNorm2d(8),
    nn.PReLU(),
    nn.MaxPool2d(2),
    nn.Upsample(scale_factor=2),
    nn.PixelShuffle(2),
    nn.GroupNorm(1, 2),
)


@pytest.mark.parametrize(
    ("name", "model", "shape", "expected"),
    [
        ("relu", nn.ReLU(), (2, 3), False),
        ("conv net", CONV_NET, (1, 3, 10, 10), False),
        ("softmax and sum", Fn(lambda x: x.softmax(1).sum(1)), (2, 3), False),
        ("cat of views", Fn(lambda x: torch.cat([x.t(), x[:1].t()], 1)), (2, 3), False),
        ("linear", nn.Linear(3, 4), (2, 3), True),
        ("matmul", Fn(lambda x: x @ x.t()), (2, 3), True),
        ("attention", Fn(lambda x: F.scaled_dot_product_attention(x, x, x)), (1, 2, 4, 8), True),
        ("einsum", Fn(lambda x: torch.einsum("ij,kj->ik", x, x)), (2, 3), True),
        ("lstm", nn.Sequential(nn.LSTM(3, 4)), (2, 5, 3), True),
        ("conv_tbc", Fn(lambda x: torch.conv_tbc(x, torch.ones(2, 3, 4), torch.ones(4))), (5, 2, 3), True),
        ("unknown", Fn(unknown), (2, 3), True),
        ("conv then linear", nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(5, 2)), (1, 3, 5), True),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_may_use_a_workspace(name: str, model: nn.Module, shape: tuple[int, ...], expected: bool) -> None:
    assert uses_workspace(export_program(model.eval(), (torch.randn(shape),), {})) is expected

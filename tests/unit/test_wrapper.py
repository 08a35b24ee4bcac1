"""What a compiler's wrapper does, followed on stand-ins, and run by the C++ without it."""

from __future__ import annotations

import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anabranch.runtime._flat import FlatProgram, Launch
from anabranch.runtime._wrapper import follow

CPU = torch.device("cpu")


def wrapper(body: str, **names: Any) -> Any:
    """A function as Inductor writes them: ``call(args)``."""
    known: dict[str, Any] = {
        "torch": torch,
        "aten": torch.ops.aten,
        "extern_kernels": object(),
        "empty_strided_cpu": None,
        "reinterpret_tensor": None,
        "assert_size_stride": None,
        **names,
    }
    exec("def call(args):\n" + textwrap.indent(textwrap.dedent(body), "    "), known)
    return known["call"]


def followed(body: str, inputs: int, **names: Any) -> FlatProgram:
    made = follow(wrapper(body, **names), inputs, CPU)
    assert isinstance(made, FlatProgram), made
    return made


def run(flat: FlatProgram, weights: list[torch.Tensor], *inputs: torch.Tensor) -> Any:
    from anabranch.runtime._translation import translate_flat

    return translate_flat(flat, weights).run(list(inputs), CPU, 0)


LINEAR = """
    weight, bias, x = args
    args.clear()
    x_size = x.size()
    s0 = x_size[0]
    assert_size_stride(weight, (3, 4), (4, 1))
    assert_size_stride(x, (s0, 4), (4, 1))
    with torch.cpu.device(0):
        torch.cpu.set_device(0)
        buf0 = empty_strided_cpu((s0, 3), (3, 1), torch.float32)
        extern_kernels.addmm(bias, x, reinterpret_tensor(weight, (4, 3), (1, 4), 0), alpha=1, beta=1, out=buf0)
        del x
        buf1 = torch.ops.aten.topk.default(buf0, 2, 1)
        buf2 = buf1[0]
        assert_size_stride(buf2, (s0, 2), (2, 1), 'torch.ops.aten.topk.default')
        buf3 = reinterpret_tensor(buf0, (s0 // 2, 3), (6, 1), 3)
        buf4 = torch.ops.aten.split.Tensor(buf0, max(s0 - 1, 1), 0)
    return (buf2, buf3, buf4[0], buf0, )
"""


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_the_same_as_what_the_wrapper_does(rows: int) -> None:
    weight, bias, x = torch.randn(3, 4), torch.randn(3), torch.randn(rows, 4)
    results = run(followed(LINEAR, 3), [weight, bias], x)
    y = torch.addmm(bias, x, weight.t())
    expected = [y.topk(2, 1).values, y[1::2], y.split(max(rows - 1, 1))[0], y]
    for got, wanted in zip(results, expected, strict=True):
        assert got.shape == wanted.shape
        assert got.stride() == wanted.stride()
        assert torch.equal(got, wanted)
    assert results[1].untyped_storage().data_ptr() == results[3].untyped_storage().data_ptr()


def test_what_an_operator_returns_is_looked_at() -> None:
    body = """
        x, = args
        buf0 = torch.ops.aten.t.default(x)
        assert_size_stride(buf0, (x.size()[1], x.size()[0]), (4, 1), 'torch.ops.aten.t.default')
        return (buf0, )
    """
    with pytest.raises(RuntimeError, match=r"torch.ops.aten.t.default returned sizes .4, 3. and strides .1, 4."):
        run(followed(body, 1), [], torch.randn(3, 4))


def test_numbers_are_computed_once_and_as_python_does() -> None:
    body = """
        x, = args
        s0 = x.size()[0]
        s1 = x.size()[0]
        n = -((s0 * 2 + 1) // -4) - (7 - s1) % 3
        return (empty_strided_cpu((n, s1), (s0, 1), torch.int64), )
    """
    flat = followed(body, 1)
    assert sum(getattr(step, "name", "") == "size" for step in flat.steps) == 1
    for size in (5, 9):
        (y,) = run(flat, [], torch.randn(size, 1))
        assert y.shape == (-((size * 2 + 1) // -4) - (7 - size) % 3, size)
        assert y.stride() == (size, 1)
        assert y.dtype is torch.int64


class Loaded:
    """A kernel as PyTorch's launcher holds it."""

    function, num_warps, shared, arg_tys = 4321, 4, 96, "OOil"
    has_global_scratch, has_profile_scratch = True, False

    def run(self, *args: Any) -> None:
        raise AssertionError("nothing is launched")


def tuner(launchers: int = 1) -> Any:
    names: dict[str, Any] = {"runner": Loaded().run}
    code = """
    def launcher(in_ptr0, out_ptr0, xnumel, ks0, stream):
        grid_0 = max(1, -((xnumel) // -(128)))
        runner(grid_0, 1, 1, stream, in_ptr0, out_ptr0, xnumel, ks0)
    """
    exec(textwrap.dedent(code), names)
    return SimpleNamespace(launchers=[names["launcher"]] * launchers, run=lambda *args, stream: None)


KERNEL = """
    x, = args
    s0 = x.size()[0]
    buf0 = empty_strided_cpu((s0, ), (1, ), torch.float32)
    stream0 = get_raw_stream(0)
    triton_0.run(x, buf0, 3*s0, s0, stream=stream0)
    return (buf0, )
"""


def test_a_kernel_is_launched_on_the_grid_that_its_launcher_computes() -> None:
    flat = followed(KERNEL, 1, triton_0=tuner())
    (launch,) = [step for step in flat.steps if isinstance(step, Launch)]
    assert (launch.kernel.function, launch.kernel.threads, launch.kernel.shared_bytes) == (4321, 128, 96)
    assert launch.kernel.types == "OOilO"
    assert launch.arguments[-1] == ("constant", None)
    assert [kind for kind, _ in launch.arguments] == ["slot", "slot", "number", "number", "constant"]
    assert [kind for kind, _ in launch.grid] == ["number", "constant", "constant"]
    with pytest.raises(RuntimeError, match="this device launches no kernels"):
        run(flat, [], torch.randn(5))


@pytest.mark.parametrize(
    ("body", "names", "why"),
    [
        ("x, = args\nif x.size()[0] == 1:\n    return (x, )\nreturn (x, )", {}, "asks for the value of a size"),
        ("x, = args\nreturn (empty_strided_cuda((2, ), (1, ), torch.half), )", {}, "empty_strided_cuda"),
        ("x, = args\nreturn (torch.zeros(2), )", {}, "torch.zeros is not known here"),
        ("x, = args\nextern_kernels.no_such_thing(x)\nreturn (x, )", {}, "no_such_thing is not known here"),
        ("x, = args\nextern_kernels.relu(x, at_once=True)\nreturn (x, )", {}, "what its schema does not have"),
        ("x, = args\nreturn (x.size()[0], )", {}, "a result is no tensor"),
        ("x, = args\nreturn (x.item(), )", {}, "item"),
        ("x, = args\nreturn (len(x.size()), )", {}, "len"),
        (KERNEL, {"triton_0": tuner(launchers=2)}, "variant is not chosen yet"),
        ("x, = args\ncpp_0(x, 3)\nreturn (x, )", {"cpp_0": torch._C._dynamo.guards.assert_size_stride}, "Error"),
    ],
)
def test_what_is_not_known_stays_with_python(body: str, names: dict[str, Any], why: str) -> None:
    made = follow(wrapper(body, **names), 1, CPU)
    assert isinstance(made, str)
    assert why in made

"""The C++ face: a model saved for it, the example server that is built with it, and what neither accepts."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import anabranch
from anabranch import InputError, UnsupportedModel, _toolchain, cpp

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/server"


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(EXAMPLE))
    import client

    return client


@pytest.fixture(scope="session")
def binary() -> Path:
    """The example server, by the command that docs/cpp.md gives; half a minute, once for these sources."""
    (header,) = (cpp.include_paths()[0] / "anabranch").glob("*.h")
    return _toolchain.build(
        "example-server",
        [EXAMPLE / "server.cpp", *cpp.sources()],
        # PyTorch's own headers have unused parameters, which the docs' command does not warn about.
        flags=["-g0", "-Wno-unused-parameter", f'-DANABRANCH_FOR="{torch.__version__}"', *cpp.compile_flags()],
        libraries=cpp.link_flags(),
        headers=[header],
        shared=False,
    )


class Served:
    """A model behind a server, and the model itself."""

    def __init__(self, example: Any, binary: Path, folder: Path, model: torch.nn.Module, inputs: Sequence[Any]) -> None:
        self.example, self.model, self.path = example, model.eval(), folder / "socket"
        cpp.save_program(self.model, inputs, folder / "program")
        self.server = example.Server(binary, folder / "program", self.path, "--workers", "3")

    def client(self) -> Any:
        return self.example.Client(self.path)


@pytest.fixture
def serve(example: Any, binary: Path, tmp_path: Path) -> Iterator[Any]:
    running: list[Served] = []

    def make(model: torch.nn.Module, *inputs: Any) -> Served:
        running.append(Served(example, binary, tmp_path, model, inputs))
        return running[-1]

    yield make
    for served in running:
        served.server.process.kill()
        served.server.process.communicate()


def same(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return result.dtype == expected.dtype and torch.equal(result, expected)


# -- the server ------------------------------------------------------------------------------------------------------


def test_the_server_needs_no_python(binary: Path) -> None:
    needed = subprocess.run(["readelf", "-d", binary], capture_output=True, text=True, check=True).stdout
    names = [line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line]
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(names)
    loaded = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
    assert "libc10.so" in loaded
    libraries = [line.split()[0] for line in loaded.splitlines()]
    assert not [name for name in names + libraries if "python" in name]


def test_clients_at_once_get_what_eager_computes(example: Any, serve: Any) -> None:
    served = serve(example.model(), torch.empty(1, 3, 32, 32))
    assert example.many_clients(served.path, served.model, "cpu", clients=6, requests=20) == []
    last = served.server.end()
    assert last.startswith("served 120 requests, refused 0,")
    assert last.endswith("; 120 calls")
    assert not served.path.exists()


class Everything(torch.nn.Module):
    """Each kind of argument and result that a program can have."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(10, 6))
        self.register_buffer("offset", torch.arange(6, dtype=torch.int64))

    def forward(self, x: torch.Tensor, i: torch.Tensor, mask: torch.Tensor, scale: float) -> Any:
        rows = torch.nn.functional.embedding(i, self.table)
        first, second = x.chunk(2)  # a list of tensors
        values, places = torch.topk(x, 3, dim=-1)  # two results
        joined = torch.cat([first, second, rows[:1]])  # a list of values
        picked = x[:, self.offset[:2]]  # optional tensors in a list
        made = torch.arange(6, dtype=torch.float64, device=x.device) + torch.ones(6, dtype=torch.float64)
        half = (x * scale).to(torch.float16).to(memory_format=torch.contiguous_format)
        clipped = torch.clamp(x, min=-0.5, max=1)
        filled = x.masked_fill(mask, float("-inf"))
        text = torch.nn.functional.gelu(x, approximate="tanh")
        normal = torch.nn.functional.layer_norm(x, [6], eps=1e-3)
        spread = torch.var_mean(x, dim=[0, 1], correction=0)
        return joined, values, places, picked, made, half, clipped, filled, text, normal, spread, x, self.table


class Folded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(37, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.attention(x.mT, x.mT, x.mT)


@pytest.mark.parametrize("required", [True, False])
def test_bits_are_eagers_whether_weights_require_a_gradient_or_not(serve: Any, required: bool) -> None:
    x = torch.randn(2, 37, 5)
    served = serve(Folded().requires_grad_(required), x)
    with served.client() as client, torch.no_grad():
        assert all(map(same, client.run([x]), served.model(x)))


def test_all_kinds_of_arguments_and_results(serve: Any) -> None:
    def inputs(seed: int) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 6, generator=g)
        return [x, torch.randint(0, 10, (3,), generator=g), torch.rand(4, 6, generator=g) < 0.3]

    served = serve(Everything(), *inputs(0), 2.5)
    with served.client() as client, torch.no_grad():
        for seed in range(1, 4):
            results = client.run(inputs(seed))
            expected = torch.utils._pytree.tree_leaves(served.model(*inputs(seed), 2.5))
            assert len(results) == len(expected) == 14
            assert all(map(same, results, expected))


def test_requests_that_are_refused(example: Any, serve: Any) -> None:
    served = serve(torch.nn.Linear(4, 2), torch.empty(3, 4))
    x = torch.randn(3, 4)
    refused = [
        ([], "0 inputs given; this engine takes 1"),
        ([x, x], "2 inputs given; this engine takes 1"),
        ([torch.randn(3, 5)], "input 0 is float32[3, 5]; this engine takes float32[3, 4]. Pass such a tensor"),
        ([torch.randn(4)], "input 0 is float32[4]; this engine takes float32[3, 4]"),
        ([torch.randn(())], "input 0 is float32[]; this engine takes float32[3, 4]"),
        ([x.double()], "input 0 is float64[3, 4]; this engine takes float32[3, 4]"),
    ]
    with served.client() as client, torch.no_grad():
        for inputs, message in refused:
            with pytest.raises(example.Refused) as caught:
                client.run(inputs)
            assert message in str(caught.value)
        good = example.encode([x])
        for body, message in [
            (good[:-1], "ends in the middle of a tensor"),
            (good + b"x", "1 bytes follow the last tensor"),
            (b"", "ends in the middle"),
            (good.replace(b"float32", b"float99"), "the dtype float99 is not known here"),
            (good.replace(struct.pack("<q", 3), struct.pack("<q", -3)), "a size is out of range"),
            (good.replace(struct.pack("<qq", 3, 4), struct.pack("<qq", 1 << 27, 1 << 27)), "a tensor is too large"),
        ]:
            with pytest.raises(example.Refused, match=message):
                client.send(body)
        # The same connection, and another one, are served as ever.
        assert same(client.run([x])[0], served.model(x))
        with served.client() as other:
            assert same(other.run([x + 1])[0], served.model(x + 1))
    assert "served 2 requests, refused 12," in served.server.end()


class Writing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        x.mul_(2)
        return x, x + 1


def test_inputs_that_the_model_writes(serve: Any) -> None:
    x = torch.randn(3, 4)
    served = serve(Writing(), x)
    with served.client() as client:
        assert all(map(same, client.run([x]), (x * 2, x * 2 + 1)))


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += x
        return self.count * 2


def test_a_model_with_state_is_served_by_sessions_alone(example: Any, serve: Any) -> None:
    model = Counting()
    served = serve(model, torch.ones(3))
    content = torch.load(served.path.parent / "program", weights_only=True)
    ((name, initial, written),) = content["state"]
    assert (name, written) == ("count", True)
    assert same(initial, torch.zeros(3))
    with served.client() as client:
        with pytest.raises(example.Refused, match=r"keeps state \('count'\), which is a session's\. Make one with"):
            client.run([torch.ones(3)])


def test_the_state_that_is_saved_is_that_of_compile(tmp_path: Path) -> None:
    model = Counting()
    with anabranch.compile(model, [torch.ones(3)], backend="eager") as engine:
        engine.session()(torch.ones(3))
        model.count.add_(5)
        cpp.save_program(engine, path=tmp_path / "p")
        expected = engine.session().state["count"]
    ((_, initial, _),) = torch.load(tmp_path / "p", weights_only=True)["state"]
    assert same(initial, expected)


def test_clients_that_break_the_protocol_or_go_away(example: Any, serve: Any) -> None:
    served = serve(torch.nn.Linear(4, 2), torch.empty(3, 4))
    x = torch.randn(3, 4)
    with served.client() as client:
        with pytest.raises(example.Refused, match="no frame of this protocol"):
            client.send(example.encode([x]), magic=b"HTTP")
        with pytest.raises(ConnectionError):
            client.run([x])
    for beginning in (b"", b"ANB1", b"ANB1" + struct.pack("<I", 100) + b"half a request"):
        with served.client() as client:
            client.socket.sendall(beginning)
            client.socket.shutdown(socket.SHUT_RDWR)
    with served.client() as client:
        client.socket.sendall(b"ANB1" + struct.pack("<I", 1 << 30))
        assert client.receive()[0] == 1
    with served.client() as client:  # does not wait for the reply
        body = example.encode([x])
        client.socket.sendall(b"ANB1" + struct.pack("<I", len(body)) + body)
    with served.client() as client, torch.no_grad():
        assert same(client.run([x])[0], served.model(x))
    served.server.end()


def test_the_server_ends_while_clients_are_connected(serve: Any) -> None:
    served = serve(torch.nn.Linear(4, 2), torch.empty(3, 4))
    ended = threading.Event()

    def ask() -> None:
        with served.client() as client:
            try:
                while True:
                    client.run([torch.randn(3, 4)])
            except (ConnectionError, OSError):
                ended.set()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    with served.client() as idle:
        idle.run([torch.randn(3, 4)])
        assert "refused 0," in served.server.end()
    for t in threads:
        t.join(timeout=60)
        assert not t.is_alive()
    assert ended.is_set()


# -- files that are refused ------------------------------------------------------------------------------------------


def saved(folder: Path, **changes: Any) -> Path:
    """A file that is right but for ``changes``."""
    path = folder / "program"
    cpp.save_program(torch.nn.Linear(4, 2), [torch.empty(3, 4)], path)
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return path


RELU = ("aten::relu", "", [("slot", 0)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "format version 1 given; this build reads version 2. Save it with the anabranch"),
        ({"format": "another"}, "is no program file (its content is something else). Expected a file that anabranch"),
        ({"steps": [("aten::no_such", "", [])]}, "step 0 of the program (aten::no_such): Could not find schema"),
        ({"steps": [("aten::relu", "", [("slot", 9)])]}, "slot 9 given, and so far there are 3"),
        ({"steps": [("aten::relu", "", [("slot", -1)])]}, "slot -1 given"),
        (
            {"steps": [("aten::relu", "", [])]},
            "(aten::relu): no self given, which has no default",
        ),
        (
            {"steps": [("aten::relu", "", [("constant", "x")])]},
            "a constant String is given where the schema",
        ),
        ({"steps": [("aten::relu", "", [("magic", "x")])]}, "an argument of kind"),
        ({"steps": [("aten::relu", "", [("slot", 0)] * 2)]}, "2 arguments given, the schema has 1"),
        ({"steps": [("aten::relu", "", [("slot", "0")])]}, "is damaged"),
        ({"steps": [RELU], "results": [4]}, "slot 4 given, and so far there are 4"),
        ({"inputs": [("float33", [1], [])]}, "the dtype float33 is not known to this version"),
        ({"inputs": [("float32", [-1], [])]}, "sizes [-1] of an input given; each must be 0 or more"),
        ({"inputs": [("float32", [1, 2], [1])]}, "1 strides of an input given, and 2 sizes"),
        ({"weights": 3}, "is damaged"),
        ({"written": [1]}, "is damaged"),
        ({"written": [-1]}, "is damaged"),
        ({"state": [("s", 3, True)]}, "is damaged"),
        (
            {"steps": [("aten::relu_", "", [("slot", 2)])]},
            "(aten::relu_): it writes into slot 2, which is not said to be written",
        ),
        ({"steps": [("aten::relu_", "", [("slot", 0)])]}, "it writes into slot 0"),
        (
            {"state": [("s", torch.zeros(2), True)], "steps": [RELU], "results": [3]},
            "slot 3 is a result, and it is state, which the next call changes. Return a copy of it.",
        ),
    ],
)
def test_files_that_the_server_refuses(
    example: Any, binary: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = saved(tmp_path, **changes)
    with pytest.raises(RuntimeError) as caught:
        example.Server(binary, path, tmp_path / "socket")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_no_program_file(example: Any, binary: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    torch.save([1, 2], tmp_path / "list")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickle")
    (tmp_path / "cut").write_bytes(saved(tmp_path).read_bytes()[:-100])
    for name in ("text", "list", "pickle", "cut", "missing"):
        with pytest.raises(RuntimeError, match=r"(is no program file|cannot be opened).*save_program"):
            example.Server(binary, tmp_path / name, tmp_path / "socket")


def test_devices_that_are_not_there(example: Any, binary: Path, tmp_path: Path) -> None:
    path = saved(tmp_path)
    for device in ("cuda", "cuda:77", "meta", "nonsense"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(RuntimeError, match=r"server: .*(device|Device)"):
            example.Server(binary, path, tmp_path / "socket", "--device", device)


# -- saving ----------------------------------------------------------------------------------------------------------


def test_a_file_holds_nothing_that_can_be_executed(tmp_path: Path) -> None:
    cpp.save_program(Everything(), [torch.randn(4, 6), torch.tensor([1]), torch.rand(4, 6) < 1, 2.5], tmp_path / "p")
    content = torch.load(tmp_path / "p", weights_only=True)

    def plain(value: Any) -> bool:
        if type(value) in (list, tuple):
            return all(map(plain, value))
        if type(value) is dict:
            return all(type(k) is str and plain(v) for k, v in value.items())
        return value is None or type(value) in (torch.Tensor, bool, int, float, str)

    assert plain(content)
    assert (content["format"], content["version"]) == ("anabranch program", 2)
    assert list(tmp_path.iterdir()) == [tmp_path / "p"]


def test_an_engine_can_be_saved(serve: Any, example: Any, binary: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()).eval()
    with anabranch.compile(model, [x], backend="eager") as engine:
        cpp.save_program(engine, path=tmp_path / "p")
        with pytest.raises(InputError, match="given with an engine, which has its own"):
            cpp.save_program(engine, [x], tmp_path / "p")
        server = example.Server(binary, tmp_path / "p", tmp_path / "s")
        with example.Client(tmp_path / "s") as client:
            assert same(client.run([x])[0], engine(x))
        server.end()


def test_an_engine_with_kernels_of_inductor_is_refused(tmp_path: Path) -> None:
    with anabranch.compile(torch.nn.Tanh(), [torch.randn(3)], backend="inductor") as engine:
        with pytest.raises(UnsupportedModel, match=r"runs kernels of inductor, which only Python can launch so far"):
            cpp.save_program(engine, path=tmp_path / "p")


class Dependent(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item()


class Branch(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Returns(torch.nn.Module):
    def __init__(self, pick: Any) -> None:
        super().__init__()
        self.pick = pick
        self.unused = torch.nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> Any:
        return x + 1, self.pick(self, x)


@torch.library.custom_op("anabranch_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Custom(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return twice(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Dependent(),
            r"cannot be saved for C\+\+: aten\.item\.default \(test_cpp_server\.py:\d+\) makes a number that",
        ),
        (Branch(), r"the model cannot be saved for C\+\+: cond \(.*\) chooses a branch"),
        (Custom(), r"calls anabranch_test::twice \(test_cpp_server\.py:\d+\), which is no operator of PyTorch"),
        (Returns(lambda self, x: 3), r"output 1 is 3; in C\+\+ results are tensors"),
        (Returns(lambda self, x: x[1:]), r"output 1 is a view of an input; return a copy of it \(\.clone\(\)\)"),
        (Returns(lambda self, x: self.unused), r"output 1 is a parameter that nothing else uses"),
    ],
)
def test_models_that_cannot_be_saved(model: torch.nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        cpp.save_program(model.eval(), [torch.randn(4)], tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no path given"):
        cpp.save_program(torch.nn.Tanh(), [torch.randn(3)])
    with pytest.raises(InputError, match="cannot be written"):
        cpp.save_program(torch.nn.Tanh(), [torch.randn(3)], tmp_path / "no" / "such" / "p")


# -- building --------------------------------------------------------------------------------------------------------


def test_what_is_compiled_knows_no_python() -> None:
    sources = cpp.sources()
    assert {"engine.cpp", "file.cpp", "specialization.cpp", "pool.cpp", "program.cpp"} <= {s.name for s in sources}
    for file in [*sources, *(h for s in sources for h in s.parent.glob("*.h"))]:
        text = file.read_text()
        assert "Python.h" not in text, file
        assert "pybind" not in text, file


def test_the_command_line_prints_what_the_functions_say() -> None:
    command = [sys.executable, "-m", "anabranch.cpp", "--sources", "--cflags", "--ldflags", "--cmake"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    parts = [*cpp.sources(), *cpp.compile_flags(), *cpp.link_flags(), cpp.cmake_path()]
    assert shlex.split(done.stdout) == list(map(str, parts))


def test_cmake_builds_the_same(tmp_path: Path) -> None:
    """Where there is CMake, its file is one way to build the server; the other tests go the other way."""
    if shutil.which("cmake") is None:
        assert (EXAMPLE / "CMakeLists.txt").is_file()
        return
    command = ["cmake", "-S", EXAMPLE, "-B", tmp_path, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    command += [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", f"-DANABRANCH={cpp.cmake_path()}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if torch.version.cuda is not None and "cannot find the CUDA" in done.stderr:
        return  # PyTorch's own file for CMake asks for CUDA's toolkit, whatever is built
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    expected = {p.resolve() for p in (*cpp.sources(), EXAMPLE / "server.cpp")}
    assert {Path(c["file"]).resolve() for c in commands} == expected
    for c in commands:
        assert f"-I{cpp.include_paths()[0]}" in c["command"].replace("cpp/../", "")
    link = (tmp_path / "CMakeFiles/server.dir/link.txt").read_text()
    assert "libc10.so" in link
    assert "torch_python" not in link

"""A client of server.cpp; run as a program, a demonstration of the two.

    python examples/server/client.py [--device cuda] [--server build/server]

saves a small model, builds the server where none is given, starts it, lets several clients send requests that differ,
compares each result with PyTorch's own bit for bit, sends requests that the server has to refuse, and ends it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from anabranch import cpp

MAGIC = b"ANB1"


class Refused(Exception):
    """The server could not do what was asked for; its message."""


class Client:
    """A connection. For one thread."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(path))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The engine's results for these inputs (CPU tensors). Raises :class:`Refused`."""
        return self.send(encode(inputs))

    def send(self, body: bytes, magic: bytes = MAGIC) -> list[torch.Tensor]:
        self.socket.sendall(magic + struct.pack("<I", len(body)) + body)
        reply = self.receive()
        if reply[0]:
            raise Refused(reply[1:].decode())
        return decode(memoryview(reply)[1:])

    def receive(self) -> bytes:
        magic, length = struct.unpack("<4sI", self._exactly(8))
        assert magic == MAGIC
        return self._exactly(length)

    def _exactly(self, n: int) -> bytes:
        parts = []
        while n:
            part = self.socket.recv(min(n, 1 << 20))
            if not part:
                raise ConnectionError("the server closed the connection")
            parts.append(part)
            n -= len(part)
        return b"".join(parts)


def encode(tensors: Sequence[torch.Tensor]) -> bytes:
    parts = [struct.pack("<I", len(tensors))]
    for x in tensors:
        name = str(x.dtype).removeprefix("torch.").encode()
        parts.append(struct.pack(f"<B{len(name)}sB{x.dim()}q", len(name), name, x.dim(), *x.shape))
        x = x.contiguous()
        parts.append(ctypes.string_at(x.data_ptr(), x.nbytes))
    return b"".join(parts)


def decode(data: memoryview) -> list[torch.Tensor]:
    (count,), at = struct.unpack_from("<I", data), 4
    tensors = []
    for _ in range(count):
        n = data[at]
        dtype = getattr(torch, bytes(data[at + 1 : at + 1 + n]).decode())
        at += 1 + n
        shape = struct.unpack_from(f"<{data[at]}q", data, at + 1)
        at += 1 + 8 * data[at]
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        # A copy: what frombuffer makes refers to the reply, which is read-only.
        raw = bytearray(data[at : at + nbytes])
        tensors.append(torch.frombuffer(raw, dtype=dtype).reshape(shape) if nbytes else torch.empty(shape, dtype=dtype))
        at += nbytes
    return tensors


class Server:
    """The program, running."""

    def __init__(self, binary: Path, program: Path, socket_path: Path, *options: str) -> None:
        # As many threads inside an operator as here: on the CPU the order of a sum depends on it.
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [str(binary), str(program), str(socket_path), *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        if not self.process.stdout.readline().startswith("listening"):
            raise RuntimeError(f"the server did not start: {self.process.stderr.read()}")

    def end(self) -> str:
        """Ask it to end; returns its last line."""
        self.process.send_signal(signal.SIGTERM)
        output, errors = self.process.communicate(timeout=60)
        if self.process.returncode != 0:
            raise RuntimeError(f"the server ended with {self.process.returncode}: {errors}")
        return output.strip()


def build(target: Path) -> Path:
    """Compile the server with g++ (or $CXX). Half a minute or so on a few cores."""
    source = Path(__file__).with_name("server.cpp")
    command = [os.environ.get("CXX", "g++"), "-O2", *cpp.compile_flags(), str(source), *map(str, cpp.sources())]
    subprocess.run([*command, *cpp.link_flags(), "-o", str(target)], check=True)
    return target


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.GELU(),
        torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(256, 10),
        torch.nn.Softmax(dim=1),
    ).eval()


def many_clients(path: Path, expected: torch.nn.Module, device: str, clients: int, requests: int) -> list[str]:
    """What went wrong, if anything did."""
    wrong: list[str] = []

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        try:
            with Client(path) as client, torch.no_grad():
                for i in range(requests):
                    x = torch.randn(1, 3, 32, 32, generator=generator)
                    (y,) = client.run([x])
                    if not torch.equal(y, expected(x.to(device)).cpu()):
                        wrong.append(f"client {number}, request {i}")
        except Exception as e:
            wrong.append(f"client {number}: {type(e).__name__}: {e}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--server", type=Path, help="the program, if it was built before")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=50, help="of each client")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        net = model().to(given.device)
        cpp.save_program(net, [torch.empty(1, 3, 32, 32, device=given.device)], folder / "model.program")
        start = time.monotonic()
        binary = given.server or build(folder / "server")
        print(f"built in {time.monotonic() - start:.1f} s", flush=True)
        options = ["--device", given.device, "--workers", str(given.clients)]
        server = Server(binary, folder / "model.program", folder / "socket", *options)
        wrong = many_clients(folder / "socket", net, given.device, given.clients, given.requests)
        try:
            with Client(folder / "socket") as client:
                client.run([torch.zeros(1, 3, 8, 8)])
            wrong.append("a request of a wrong shape was served")
        except Refused as e:
            print(f"refused, as it should be: {e}")
        print(server.end())
    for line in wrong:
        print(f"wrong: {line}")
    print(f"{given.clients * given.requests} results compared with PyTorch's own, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

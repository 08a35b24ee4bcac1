"""How often TensorRT's outputs differ between calls because its kernels start before the ones ahead of them have ended.

    python benchmarks/early_kernels.py --work resnet18 --seconds 10 --json benchmarks/results/early_kernels_h200.json

One engine, an execution context with a workspace, an input and an output of its own for each of eight threads and
streams, a CUDA graph of each: nothing of this project's runtime is in between. Each thread replays its graph on inputs
in turn, and every output is compared, bit for bit, with the one of a call that had the device for itself. Once with the
graphs as they were captured, where TensorRT launches kernels early (``docs/tensorrt.md``), and once with each kernel
made to wait for the whole of the one before: the two in turn, ``--rounds`` times.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import click
import torch

import anabranch
from anabranch.backends.tensorrt import library
from anabranch.bench import find_work
from anabranch.check import environment, write_json

THREADS, INPUTS = 8, 8
#: Calls between two looks at the outputs, which are kept until then.
KEPT = 2000


class Caller:
    """A thread's stream, and a graph of one execution context on it."""

    def __init__(self, engine: Any, inputs: list[torch.Tensor], whole: bool) -> None:
        from anabranch.devices.cuda._early import complete, early_edges

        self.stream = torch.cuda.Stream()
        self.inputs = inputs
        with torch.cuda.stream(self.stream):
            self.workspace = torch.empty(engine.workspace_bytes, dtype=torch.uint8, device="cuda")
            self.read, self.written = inputs[0].clone(), engine.outputs[0].empty(engine.device)[0]
        self.stream.synchronize()
        self.context = engine.context()
        self.context.set_device_memory(self.workspace.data_ptr(), engine.workspace_bytes)
        self.context.set_tensor_address("input_0", self.read.data_ptr())
        self.context.set_tensor_address("output_0", self.written.data_ptr())
        self.context.execute_async_v3(self.stream.cuda_stream)
        self.stream.synchronize()
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.context.execute_async_v3(self.stream.cuda_stream)
        source = self.graph.raw_cuda_graph()
        if whole:
            complete(source)
        self.early = len(early_edges(source))
        self.graph.instantiate()

    def call(self, k: int) -> torch.Tensor:
        """On the current stream, which has to be this one's: input ``k`` in, one replay."""
        self.read.copy_(self.inputs[k])
        self.graph.replay()
        return self.written


def measure(engine: Any, inputs: list[torch.Tensor], whole: bool, seconds: float) -> dict[str, Any]:
    callers = [Caller(engine, inputs, whole) for _ in range(THREADS)]
    references = []
    for k in range(len(inputs)):
        with torch.cuda.stream(callers[0].stream):
            references.append(callers[0].call(k).clone())
        torch.cuda.synchronize()
    scales = torch.stack([y.float().abs().max() for y in references])
    expected = torch.stack(references)
    counts: list[tuple[int, int, float]] = []
    start = threading.Barrier(THREADS)

    def work(i: int) -> None:
        caller = callers[i]
        with torch.no_grad(), torch.cuda.stream(caller.stream):
            kept = torch.empty(KEPT, *expected.shape[1:], dtype=expected.dtype, device="cuda")
            which = (torch.arange(KEPT, device="cuda") + i) % len(inputs)
            different, worst, calls = torch.zeros((), device="cuda"), torch.zeros((), device="cuda"), 0
            caller.stream.synchronize()
            start.wait()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                for j in range(KEPT):
                    y = caller.call((i + j) % len(inputs))
                    kept[j].copy_(y)
                    y.fill_(float("nan"))
                calls += KEPT
                off = (kept.float() - expected[which].float()).abs().flatten(1).amax(1)
                off = torch.where(off.isfinite(), off, torch.inf)
                different += (off > 0).sum()
                worst = torch.maximum(worst, (off / scales[which]).max())
                caller.stream.synchronize()
            counts.append((calls, int(different), float(worst)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    before = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - before
    calls = sum(c for c, _, _ in counts)
    return {
        "kernels_wait_for_the_whole_of_the_one_before": whole,
        "early_edges": callers[0].early,
        "calls": calls,
        "different": sum(d for _, d, _ in counts),
        "largest_difference_to_largest_output": max(w for _, _, w in counts),
        "calls_a_second": round(calls / took),
    }


@click.command()
@click.option("--work", "name", default="resnet18", show_default=True, help="One of `anabranch bench --list`.")
@click.option("--seconds", default=10.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path))
def main(name: str, seconds: float, rounds: int, path: Path | None) -> None:
    about = find_work(name)
    model = about.make().cuda().half().eval()
    inputs = [torch.randn(about.shape_on("cuda"), device="cuda").half() * (0.5 + 0.25 * i) for i in range(INPUTS)]
    if about.channels_last:
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    with anabranch.compile(model, [inputs[0]], backend="tensorrt", require_full=True, max_contexts=1) as compiled:
        # The engine under the runtime: what follows makes its own contexts of it.
        lowered = compiled._first().choice.kernels
        (engine,) = lowered.engines.values()
        entered = [engine.inputs[0].to_engine(x) for x in inputs]
        rows = []
        for _ in range(rounds):
            for whole in (False, True):
                rows.append(measure(engine, entered, whole, seconds))
                print(rows[-1], flush=True)
    about_it = library()
    where = environment("cuda") | {
        "tensorrt": f"{about_it.name} {about_it.version}",
        "command": f"python benchmarks/early_kernels.py {' '.join(sys.argv[1:])}".rstrip(),
    }
    if path is not None:
        write_json(path, {"environment": where, "work": name, "threads": THREADS, "rows": rows})


if __name__ == "__main__":
    main()

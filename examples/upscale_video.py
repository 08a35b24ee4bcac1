"""Upscales a video x2 with one engine and several frames in flight.

    python examples/upscale_video.py                       # the clip beside this file -> upscaled.mp4
    python examples/upscale_video.py in.mp4 out.mp4 --device cuda --streams 8

Frames go through three stages: decode -> a ring of slots, each with one frame in flight -> encode. On CUDA every slot
has its own stream; on the CPU every slot is a task of a thread pool. All slots call the same engine, and nothing here
synchronizes anything for the engine's sake: a call is ordered on its slot's stream like any PyTorch operation.
Each frame is checked for NaN and infinities, which pixels do not show. Sampled frames are compared with the float32
model. A frame that is wrong makes the exit status 1; a model that gives no finite picture itself makes it 2.

The output has the frames in order at the input's average rate, without sound.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import anabranch
from anabranch.models import upscaler

try:
    import av
    import numpy as np
except ImportError as missing:
    raise SystemExit(f"This example needs {missing.name}: pip install 'anabranch[video]'") from missing

CLIP = Path(__file__).parent / "clip" / "clip.mp4"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
#: How far an output pixel may be from the float32 model's, in levels of 255. Rounding to a level can turn the least
#: difference into 1; float16 keeps 11 bits, which adds up to a third of a level before that.
TOLERANCE = {"float16": 2, "float32": 1}

Engine = Callable[[torch.Tensor], torch.Tensor]


class Done(NamedTuple):
    """An upscaled frame: source ``(H, W, 3)`` and result ``(2H, 2W, 3)``, uint8 RGB. ``result`` may be a slot's own
    buffer: it is valid until the next frame is asked for. ``finite``: the engine's picture had no NaN and no infinity.
    """

    source: np.ndarray
    result: np.ndarray
    finite: bool = True


# --- pixels <-> the model's floats; both run on the device where the pixels are --------------------------------------


def to_floats(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``(H, W, 3)`` uint8 -> ``(1, 3, H, W)`` in [0, 1], contiguous."""
    return pixels.permute(2, 0, 1).unsqueeze(0).to(dtype, memory_format=torch.contiguous_format).div_(255)


def to_pixels(picture: torch.Tensor) -> torch.Tensor:
    """``(1, 3, H, W)`` -> ``(H, W, 3)`` uint8; what overshoots [0, 1] is clamped."""
    return picture.squeeze(0).permute(1, 2, 0).float().clamp(0, 1).mul(255).round().to(torch.uint8)


# --- decode and encode ------------------------------------------------------------------------------------------------


def decode(container: av.container.InputContainer) -> Iterator[np.ndarray]:
    """Yield the frames of the first video stream as ``(H, W, 3)`` uint8 RGB arrays, all of one size."""
    size = None
    count = 0
    try:
        for frame in container.decode(video=0):
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                raise click.ClickException(
                    f"frame {count} is {frame.width}x{frame.height}, but the video began with {size[0]}x{size[1]}"
                )
            yield frame.to_ndarray(format="rgb24")
            count += 1
    except av.FFmpegError as error:
        raise click.ClickException(f"{container.name} cannot be decoded after {count} frames: {error}") from error


def add_video(container: av.container.OutputContainer, rate: Fraction, width: int, height: int) -> av.VideoStream:
    """Add a video stream: H.264 where PyAV was built with libx264, MPEG-4 part 2 otherwise."""
    if "libx264" in av.codecs_available:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "18"})
    else:
        stream = container.add_stream("mpeg4", rate=rate, options={"q:v": "3"})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    return stream


# --- frames in flight -------------------------------------------------------------------------------------------------


class CudaSlot:
    """One frame in flight on a CUDA stream of its own. Used by one thread, the one that decodes and encodes.

    ``submit`` queues everything and returns; ``finish`` is the only place where the host waits. The two pinned buffers
    belong to the frame from ``submit`` until the next ``submit``, which comes only after ``finish``: so the copy to the
    device has been made before its source is refilled, and the result has been encoded before it is overwritten.
    """

    def __init__(self, engine: Engine, device: torch.device, dtype: torch.dtype, height: int, width: int) -> None:
        self._engine, self._device, self._dtype = engine, device, dtype
        self._stream = torch.cuda.Stream(device)
        self._copied_out = torch.cuda.Event(blocking=True)  # the waiting host sleeps, and leaves a core to the codec
        self._host_in = torch.empty(height, width, 3, dtype=torch.uint8, pin_memory=True)
        self._host_out = torch.empty(2 * height, 2 * width, 3, dtype=torch.uint8, pin_memory=True)
        self._finite = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._source: np.ndarray | None = None

    def submit(self, frame: np.ndarray) -> None:
        self._source = frame
        self._host_in.copy_(torch.from_numpy(frame))
        with torch.cuda.stream(self._stream):
            pixels = self._host_in.to(self._device, non_blocking=True)
            upscaled = self._engine(to_floats(pixels, self._dtype))
            self._host_out.copy_(to_pixels(upscaled), non_blocking=True)
            self._finite.copy_(upscaled.isfinite().all(), non_blocking=True)
            self._copied_out.record()

    def finish(self) -> Done:
        self._copied_out.synchronize()
        assert self._source is not None
        return Done(self._source, self._host_out.numpy(), bool(self._finite))


class CpuSlot:
    """One frame in flight on a thread pool, whose workers call the one engine at the same time."""

    def __init__(self, engine: Engine, dtype: torch.dtype, workers: ThreadPoolExecutor) -> None:
        self._engine, self._dtype, self._workers = engine, dtype, workers
        self._result: Future[Done] | None = None

    def submit(self, frame: np.ndarray) -> None:
        self._result = self._workers.submit(self._upscale, frame)

    def _upscale(self, frame: np.ndarray) -> Done:
        upscaled = self._engine(to_floats(torch.from_numpy(frame), self._dtype))
        return Done(frame, to_pixels(upscaled).contiguous().numpy(), bool(upscaled.isfinite().all()))

    def finish(self) -> Done:
        assert self._result is not None
        return self._result.result()


def in_flight(frames: Iterable[np.ndarray], slots: list[CudaSlot] | list[CpuSlot]) -> Iterator[Done]:
    """Yield the upscaled frames in order, keeping as many frames in flight as there are slots.

    A slot takes its next frame only when the consumer comes back for more, that is, when it is done with the last.
    """
    free, busy = deque(slots), deque()
    for frame in frames:
        if not free:
            oldest = busy.popleft()
            yield oldest.finish()
            free.append(oldest)
        slot = free.popleft()
        slot.submit(frame)
        busy.append(slot)
    for slot in busy:
        yield slot.finish()


# --- verification -----------------------------------------------------------------------------------------------------


class NotVerified(click.ClickException):
    """There is nothing by which a right frame could be told from a wrong one."""

    exit_code = 2


class Sample:
    """Keeps copies of about evenly spaced frames of a video whose length is not known: at most ``2 * wanted``."""

    def __init__(self, wanted: int) -> None:
        self._wanted, self._seen, self._stride = wanted, 0, 1
        self._kept: list[Done] = []

    def offer(self, done: Done) -> None:
        if self._wanted and self._seen % self._stride == 0:
            if len(self._kept) == 2 * self._wanted:
                self._kept = self._kept[::2]
                self._stride *= 2
            # After thinning, this frame may be off the wider stride.
            if self._seen % self._stride == 0:
                self._kept.append(Done(done.source, done.result.copy(), done.finite))
        self._seen += 1

    def frames(self) -> list[Done]:
        count = min(self._wanted, len(self._kept))
        return [self._kept[round(place)] for place in np.linspace(0, len(self._kept) - 1, count)]


def compare(sample: list[Done], model: torch.nn.Module, device: torch.device) -> tuple[int, float]:
    """Run the float32 model on the sampled sources: the largest difference in levels, and the lowest PSNR in dB.

    A frame of another size, or one that is not finite, differs by all 255 levels."""
    worst, lowest = 0, math.inf
    for done in sample:
        picture = model(to_floats(torch.from_numpy(done.source).to(device), torch.float32))
        if not picture.isfinite().all():
            raise NotVerified("the float32 model itself gives NaN or infinities: nothing can be verified with it")
        expected = to_pixels(picture).cpu().numpy()
        if done.result.shape != expected.shape or not done.finite:
            worst, lowest = 255, 0.0
            continue
        difference = np.abs(expected.astype(np.int16) - done.result)
        worst = max(worst, int(difference.max()))
        noise = float(np.square(difference, dtype=np.float64).mean())
        lowest = min(lowest, 10 * math.log10(255**2 / noise) if noise else math.inf)
    return worst, lowest


# --- the command ------------------------------------------------------------------------------------------------------


def pick_device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("PyTorch finds no CUDA device here; leave --device away, or say --device cpu")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def open_input(path: Path) -> av.container.InputContainer:
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise click.ClickException(f"{path} cannot be read as a video: {error}") from error
    if not container.streams.video:
        container.close()
        raise click.ClickException(f"{path} has no video in it")
    return container


def open_output(
    path: Path, rate: Fraction, width: int, height: int
) -> tuple[av.container.OutputContainer, av.VideoStream]:
    """Begin the output file, so that a path that cannot be written is known before any work is done."""
    container = None
    try:
        container = av.open(str(path), "w")
        stream = add_video(container, rate, width, height)
        container.start_encoding()
    except (av.FFmpegError, OSError, ValueError) as error:
        if container is not None:
            container.close()
        raise click.ClickException(f"{path} cannot be written as a video: {error}") from error
    return container, stream


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("source", metavar="[INPUT]", type=click.Path(path_type=Path), default=CLIP)
@click.argument("target", metavar="[OUTPUT]", type=click.Path(path_type=Path), default=Path("upscaled.mp4"))
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: cuda where there is one.")
@click.option(
    "--dtype", "dtype_name", type=click.Choice(sorted(DTYPES)), help="Default: float16 on cuda, float32 on cpu."
)
@click.option("--streams", type=click.IntRange(1), default=4, help="Frames in flight: CUDA streams, or CPU threads.")
@click.option("--frames", type=click.IntRange(1), help="Stop after this many frames.")
@click.option("--backend", type=click.Choice(["inductor", "eager"]), default="inductor", help="What makes the kernels.")
@click.option("--verify", type=click.IntRange(0), default=4, help="How many frames to compare with eager float32.")
def main(
    source: Path,
    target: Path,
    device: str | None,
    dtype_name: str | None,
    streams: int,
    frames: int | None,
    backend: str,
    verify: int,
) -> None:
    """Upscale the video INPUT (default: the clip beside this file) x2 into OUTPUT (default: upscaled.mp4)."""
    if source.resolve() == target.resolve():
        raise click.ClickException(f"OUTPUT is the INPUT, {source}: name another file")
    where = pick_device(device)
    dtype_name = dtype_name or ("float16" if where.type == "cuda" else "float32")
    dtype = DTYPES[dtype_name]
    console = Console()
    # TensorFloat-32 would make the float32 comparison one of 11 bits.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if where.type == "cpu":
        # The pool's threads share the cores; each running every kernel on all of them would only make them queue up.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // streams))

    with ExitStack() as cleanup:
        reader = cleanup.enter_context(open_input(source))
        video = reader.streams.video[0]
        video.thread_type = "AUTO"
        decoded = itertools.islice(decode(reader), frames)
        first = next(decoded, None)
        if first is None:
            raise click.ClickException(f"{source} has no frame in it")
        height, width, _ = first.shape
        writer, output = open_output(target, video.average_rate or Fraction(30), 2 * width, 2 * height)
        cleanup.enter_context(writer)

        console.print(f"Compiling the upscaler for {width}x{height} {dtype_name} on {where} ({backend}) ...")
        began = time.perf_counter()
        example = torch.zeros(1, 3, height, width, dtype=dtype, device=where)
        model = upscaler().to(where, dtype)
        engine = anabranch.compile(model, inputs=[example], backend=backend, max_contexts=streams)
        cleanup.callback(engine.close)
        engine.warm(contexts=streams)
        console.print(f"Ready after {time.perf_counter() - began:.1f} s.")

        if where.type == "cuda":
            slots = [CudaSlot(engine, where, dtype, height, width) for _ in range(streams)]
        else:
            workers = cleanup.enter_context(ThreadPoolExecutor(streams, thread_name_prefix="upscale"))
            slots = [CpuSlot(engine, dtype, workers) for _ in range(streams)]

        sample = Sample(verify)
        count = not_finite = 0
        total = min((known for known in (video.frames, frames) if known), default=None)
        bar = Progress(
            TextColumn("Upscaling"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} frames/s"),
            TimeRemainingColumn(),
            console=console,
        )
        began = time.perf_counter()
        with bar:
            task = bar.add_task("", total=total, rate=0.0)
            for done in in_flight(itertools.chain([first], decoded), slots):
                writer.mux(output.encode(av.VideoFrame.from_ndarray(done.result, format="rgb24")))
                sample.offer(done)
                count += 1
                not_finite += not done.finite
                bar.update(task, advance=1, rate=count / (time.perf_counter() - began))
            writer.mux(output.encode(None))
        seconds = time.perf_counter() - began

    checked = sample.frames()
    worst, psnr = compare(checked, upscaler().to(where), where)
    good = worst <= TOLERANCE[dtype_name]

    table = Table(title=f"{source.name} -> {target}", show_header=False)
    rows = {
        "frames": str(count),
        "size in, out": f"{width}x{height}, {2 * width}x{2 * height}",
        "engine": f"{where}, {dtype_name}, {backend}",
        "streams" if where.type == "cuda" else "threads": str(streams),
        "frames per second": f"{count / seconds:.1f}",
    }
    if checked:
        rows["frames verified"] = f"{len(checked)}: {'ok' if good else '[red]WRONG[/]'}"
        rows["max error"] = f"{worst} of 255 (at most {TOLERANCE[dtype_name]} allowed)"
        rows["PSNR to eager float32"] = "identical" if math.isinf(psnr) else f"{psnr:.1f} dB"
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    if not_finite:
        raise click.ClickException(f"{not_finite} of {count} frames have NaN or infinities; expected none")
    if not good:
        raise click.ClickException(
            f"a frame differs from the float32 model by {worst} levels of 255; at most {TOLERANCE[dtype_name]} expected"
        )


if __name__ == "__main__":
    main()

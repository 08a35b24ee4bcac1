"""examples/upscale_video.py on the CPU, through its command line, on the bundled clip."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

EXAMPLES = Path(__file__).parents[2] / "examples"
CLIP = EXAMPLES / "clip" / "clip.mp4"

try:
    import av
except ModuleNotFoundError:
    av = None

# Collected where there is no PyAV too, so that the tier has the same number of tests on every host.
pytestmark = pytest.mark.skipif(av is None, reason="PyAV is not installed")


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The example as a module. What it sets process-wide is set back afterwards."""
    threads = torch.get_num_threads()
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    spec = importlib.util.spec_from_file_location("upscale_video", EXAMPLES / "upscale_video.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


def run(example: ModuleType, *arguments: object) -> Result:
    return CliRunner().invoke(example.main, [str(argument) for argument in arguments])


def read(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine 48x32 frames, each of one grey that tells its number, encoded without loss."""
    path = tmp_path_factory.mktemp("video") / "tiny.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        for number in range(9):
            picture = np.full((32, 48, 3), 20 * number + 20, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_the_bundled_clip_is_small_and_real() -> None:
    assert CLIP.stat().st_size < 1_000_000
    frames = read(CLIP)
    assert len(frames) == 48
    assert all(frame.shape == (180, 320, 3) for frame in frames)
    assert min(frame.std() for frame in frames) > 20


def test_from_the_shell(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    script = [sys.executable, str(EXAMPLES / "upscale_video.py")]
    options = ["--device", "cpu", "--backend", "eager", "--frames", "3", "--streams", "2", "--verify", "2"]
    done = subprocess.run([*script, str(CLIP), str(target), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "frames per second" in done.stdout
    assert "2: ok" in done.stdout
    frames = read(target)
    assert [frame.shape for frame in frames] == [(360, 640, 3)] * 3
    for small, large in zip(read(CLIP), frames, strict=False):
        # Lossy twice, but the same picture: each 2x2 block has its pixel's value.
        blocks = large.reshape(180, 2, 320, 2, 3).mean(axis=(1, 3))
        assert np.square(blocks - small).mean() < 255**2 / 10 ** (34 / 10)


@pytest.mark.parametrize("streams", [1, 4, 12])
def test_frames_stay_in_order(example: ModuleType, tiny: Path, tmp_path: Path, streams: int) -> None:
    target = tmp_path / "out.mp4"
    result = run(example, tiny, target, "--device", "cpu", "--backend", "eager", "--streams", streams)
    assert result.exit_code == 0, result.output
    assert [round(frame.mean() / 20) for frame in read(target)] == list(range(1, 10))


def test_inductor(example: ModuleType, tiny: Path, tmp_path: Path) -> None:
    result = run(example, tiny, tmp_path / "out.mp4", "--device", "cpu", "--frames", 3)
    assert result.exit_code == 0, result.output
    assert "3: ok" in result.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (torch.zeros_like, "differs from the float32 model by 180 levels"),
        (lambda y: y + 0.1, "differs from the float32 model by 2"),
        (lambda y: y * float("nan"), "9 of 9 frames have NaN or infinities"),
        (lambda y: torch.where(y > 0.7, float("inf"), y), "1 of 9 frames have NaN or infinities"),
    ],
    ids=["zeros", "brighter", "NaN", "an infinity"],
)
def test_a_wrong_frame_makes_the_exit_status_1(
    example: ModuleType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: str
) -> None:
    compile_right = example.anabranch.compile

    def compile_wrong(*arguments: object, **options: object) -> object:
        engine = compile_right(*arguments, **options)

        class Wrong:
            warm, close = engine.warm, engine.close

            def __call__(self, x: torch.Tensor) -> torch.Tensor:
                return change(engine(x))

        return Wrong()

    monkeypatch.setattr(example.anabranch, "compile", compile_wrong)
    result = run(example, tiny, tmp_path / "out.mp4", "--device", "cpu", "--backend", "eager")
    assert result.exit_code == 1
    assert words in result.output


def test_frames_that_cannot_be_verified_are_not_called_right(example: ModuleType) -> None:
    source = np.full((4, 6, 3), 100, dtype=np.uint8)
    right = example.to_pixels(example.upscaler()(example.to_floats(torch.from_numpy(source), torch.float32))).numpy()
    device = torch.device("cpu")
    assert example.compare([example.Done(source, right)], example.upscaler(), device) == (0, math.inf)
    assert example.compare([example.Done(source, right[:-1])], example.upscaler(), device) == (255, 0.0)
    assert example.compare([example.Done(source, right, False)], example.upscaler(), device) == (255, 0.0)
    with pytest.raises(example.NotVerified, match="nothing can be verified") as refused:
        example.compare([example.Done(source, right)], lambda x: x * float("nan"), device)
    assert refused.value.exit_code == 2


def test_kind_errors(example: ModuleType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    junk = tmp_path / "junk.mp4"
    junk.write_text("not a video")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in [
        ((tmp_path / "none.mp4",), "cannot be read as a video"),
        ((junk, tmp_path / "out.mp4"), "cannot be read as a video"),
        ((tiny, tmp_path / "no" / "such" / "folder.mp4"), "cannot be written as a video"),
        ((tiny, tmp_path / "out.unknown"), "cannot be written as a video"),
        ((tiny, tiny), "OUTPUT is the INPUT"),
        ((tiny, tmp_path / "out.mp4", "--device", "cuda"), "no CUDA device"),
    ]:
        result = run(example, *arguments)
        assert result.exit_code == 1
        assert message in result.output
        assert "Traceback" not in result.output


def test_without_pyav_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "av.py").write_text("raise ImportError('no av here', name='av')")
    script = str(EXAMPLES / "upscale_video.py")
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path({script!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.strip() == "This example needs av: pip install 'anabranch[video]'"


@pytest.mark.parametrize(("wanted", "total"), [(0, 5), (1, 1), (4, 3), (4, 4), (4, 9), (4, 48), (3, 100)])
def test_samples_are_spread_over_a_video_of_unknown_length(example: ModuleType, wanted: int, total: int) -> None:
    sample = example.Sample(wanted)
    for number in range(total):
        sample.offer(example.Done(np.array(number), np.array(number)))
    numbers = [int(done.source) for done in sample.frames()]
    assert len(numbers) == min(wanted, total)
    assert numbers == sorted(set(numbers))
    if wanted and total > wanted:
        gaps = np.diff([*numbers, total])
        assert gaps.max() <= math.ceil(2.5 * total / wanted)

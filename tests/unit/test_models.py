"""The built-in models: shapes, determinism, number formats, export; and that the upscaler is an upscaler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from anabranch.models import BUILTIN, Builtin, Shape, upscaler

CLIP = Path(__file__).parents[2] / "examples" / "clip" / "clip.mp4"
HALF_FORMATS = [torch.float16, torch.bfloat16]


def small(builtin: Builtin) -> list[Shape]:
    """The shapes that cost next to nothing on a CPU."""
    return [shape for shape in builtin.boundary if math.prod(shape) < 100_000]


def make_input(builtin: Builtin, shape: Shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if builtin.unit_range:
        return torch.rand(shape, generator=generator)
    return torch.randn(shape, generator=generator)


@pytest.fixture(params=sorted(BUILTIN))
def builtin(request: pytest.FixtureRequest) -> Builtin:
    return BUILTIN[request.param]


def test_every_model_has_its_edges_and_its_benchmark(builtin: Builtin) -> None:
    assert builtin.benchmark
    assert any(0 in shape for shape in builtin.boundary), "no empty batch"
    assert any(any(n % 2 for n in shape[1:]) for shape in builtin.boundary), "no odd size"
    assert set(BUILTIN["relu"].benchmark) == {(1, 3, 5), (1, 3, 2160, 3840)}


def test_model_is_ready_for_inference(builtin: Builtin) -> None:
    model = builtin.make()
    assert not any(module.training for module in model.modules())
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        assert not tensor.requires_grad
        assert tensor.device.type == "cpu"
        assert tensor.dtype in (torch.float32, torch.int64)  # int64: how many batches a norm has seen
        assert tensor.isfinite().all()


def test_same_bits_from_two_calls(builtin: Builtin) -> None:
    torch.manual_seed(1)
    first = builtin.make().state_dict()
    torch.manual_seed(2)
    second = builtin.make().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_global_random_state_is_not_moved(builtin: Builtin) -> None:
    before = torch.get_rng_state()
    builtin.make()
    assert torch.equal(torch.get_rng_state(), before)


def test_user_defaults_do_not_reach_the_model(builtin: Builtin) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            model = builtin.make()
    finally:
        torch.set_default_dtype(torch.float32)
    expected = builtin.make().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_output_shapes(builtin: Builtin) -> None:
    model = builtin.make()
    for shape in small(builtin):
        out = model(make_input(builtin, shape))
        if builtin is BUILTIN["upscaler"]:
            assert out.shape == (shape[0], 3, 2 * shape[2], 2 * shape[3])
        elif builtin is BUILTIN["branches"]:
            assert out.shape == (shape[0], 1000)
        else:
            assert out.shape == shape
        assert out.isfinite().all()


@pytest.mark.parametrize("dtype", HALF_FORMATS, ids=str)
def test_half_formats_stay_close_to_float32(builtin: Builtin, dtype: torch.dtype) -> None:
    for shape in small(builtin):
        x = make_input(builtin, shape).to(dtype)
        expected = builtin.make()(x.float())
        out = builtin.make().to(dtype)(x)
        assert out.dtype == dtype
        assert out.isfinite().all()
        if out.numel():
            # Relative to the output's size: a few units in the last place, for the layers one after the other.
            error = (out.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
            assert error < 8 * torch.finfo(dtype).eps


def test_intermediate_values_are_far_from_the_limits_of_float16(builtin: Builtin) -> None:
    model = builtin.make()
    largest: list[float] = []
    for module in model.modules():
        module.register_forward_hook(lambda _module, _inputs, out: largest.append(out.abs().max().item()))
    model(make_input(builtin, next(shape for shape in reversed(small(builtin)) if math.prod(shape))))
    assert min(largest) > 1e-2
    assert max(largest) < 100


def test_output_depends_on_the_input(builtin: Builtin) -> None:
    shape = next(shape for shape in builtin.boundary if len(shape) == 4 and math.prod(shape))
    x = make_input(builtin, shape)
    model = builtin.make()
    assert (model(x) - model(x.flip(0).roll(1, -1) * 0.5)).abs().mean() > 0.01


def test_exports(builtin: Builtin) -> None:
    shape = next(shape for shape in builtin.boundary if math.prod(shape) > 1)
    x = make_input(builtin, shape)
    model = builtin.make()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_upscaled_block_averages_to_its_pixel() -> None:
    x = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(3))
    for scale in (2, 3, 4):
        up = upscaler(scale=scale, convs=2)(x)
        assert up.shape == (1, 3, scale * 9, scale * 13)
        # Within 4 sigma of the random features' share, a third of a level of 255.
        assert (functional.avg_pool2d(up, scale) - x).abs().max() < 4 / (3 * 255)


def test_upscaler_refuses_what_it_cannot_build() -> None:
    for wrong in ({"channels": 3}, {"convs": -1}, {"scale": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            upscaler(**wrong)


def clip_frames() -> Iterator[torch.Tensor]:
    """One frame of each of the clip's four shots: ``(1, 3, 180, 320)`` float32 in [0, 1]."""
    av = pytest.importorskip("av")
    with av.open(str(CLIP)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index % 12 == 6:
                yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).unsqueeze(0) / 255.0


def psnr(picture: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB for pictures in [0, 1]."""
    return -10 * math.log10((picture.clamp(0, 1) - truth).square().mean().item())


def test_upscaler_beats_nearest_and_bilinear_on_photographs() -> None:
    model = upscaler()
    for shot, truth in enumerate(clip_frames()):
        small_picture = functional.avg_pool2d(truth, 2)
        ours = psnr(model(small_picture), truth)
        nearest = psnr(functional.interpolate(small_picture, scale_factor=2, mode="nearest"), truth)
        bilinear = psnr(functional.interpolate(small_picture, scale_factor=2, mode="bilinear"), truth)
        print(f"shot {shot}: upscaler {ours:.2f} dB, nearest {nearest:.2f}, bilinear {bilinear:.2f}")
        assert ours > nearest + 0.2
        assert ours > bilinear + 0.2

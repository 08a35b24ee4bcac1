"""``torch.istft``, in operators that can be recorded.

PyTorch's own waits for a value: whether the windows add up to nothing somewhere, which it refuses. So it is no part of
a graph. All that it computes is; here are the operators that it computes with, in their order, so that the bits are its
own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_aten = torch.ops.aten
#: The last one is how an exported program calls it.
FUNCTIONS = (torch.istft, torch.Tensor.istft, _aten.istft.default)
#: How an inverse transform is scaled: by the root of the number of its points, or by the number.
_BY_ROOT, _BY_NUMBER = 1, 2


def spelled_out(
    input: torch.Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: torch.Tensor | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> torch.Tensor:
    """``torch.istft``, but for the look at the sum of the windows: where that is zero, the result is no finite number.

    Raises ``RuntimeError`` for what PyTorch's refuses, and whoever runs the model on it is told in PyTorch's words.
    """
    hop = n_fft // 4 if hop_length is None else hop_length
    width = n_fft if win_length is None else win_length
    frames = input.shape[-1]
    onesided = input.shape[-2] != n_fft if onesided is None else onesided
    points = n_fft // 2 + 1 if onesided else n_fft
    allowed = (
        input.is_complex() and input.dim() in (2, 3) and input.numel() > 0 and input.shape[-2] == points,
        0 < hop <= width <= n_fft,
        window is None or tuple(window.shape) == (width,),
        not (onesided if return_complex else window is not None and window.is_complex()),
    )
    if not all(allowed):
        raise RuntimeError("istft does not accept these arguments")
    whole = n_fft + hop * (frames - 1)
    if window is None:
        window = torch.ones(width, dtype=input.dtype.to_real(), device=input.device)
    if width != n_fft:
        left = (n_fft - width) // 2
        window = F.pad(window, (left, n_fft - width - left))
    spectrum = input if input.dim() == 3 else input.unsqueeze(0)
    spectrum = spectrum.transpose(1, 2)
    scale = _BY_ROOT if normalized else _BY_NUMBER
    if return_complex:
        y = _aten._fft_c2c(spectrum, [2], scale, False)
    else:
        spectrum = spectrum if onesided else spectrum.narrow(-1, 0, n_fft // 2 + 1)
        y = _aten._fft_c2r(spectrum, [2], scale, n_fft)
    y = y * window.view(1, 1, n_fft)
    y = _aten.unfold_backward(y, [y.shape[0], whole], 1, n_fft, hop)
    squares = window.pow(2).expand(1, frames, n_fft)
    sums = _aten.unfold_backward(squares, [1, whole], 1, n_fft, hop)
    start = n_fft // 2 if center else 0
    end = whole if length is None else start + length
    if center and length is None:
        end = whole - n_fft // 2
    kept = slice(start, min(end, whole))
    y = y[:, kept] / sums[:, kept]
    if input.dim() == 2:
        y = y.squeeze(0)
    return F.pad(y, (0, end - whole)) if end > whole else y

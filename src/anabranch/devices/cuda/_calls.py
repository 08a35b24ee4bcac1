"""Calls into CUDA's runtime: its bindings, and its errors as exceptions."""

from __future__ import annotations

from typing import Any

from anabranch.errors import AnabranchError

try:
    from cuda.bindings import driver
    from cuda.bindings import runtime as rt
except ImportError as e:  # pragma: no cover - PyTorch's CUDA 13 wheels depend on it
    raise AnabranchError(
        "CUDA engines need the package cuda-bindings, which is not installed here. Do: pip install 'anabranch[cuda]'"
    ) from e

__all__ = [
    "ACTIVE",
    "NOT_CAPTURING",
    "RELAXED",
    "STICKY",
    "SUCCESS",
    "THREAD_LOCAL",
    "CudaCallError",
    "checked",
    "driver",
    "rt",
]


#: Errors after which the CUDA context of this process is unusable, and every later call fails too.
STICKY = {
    int(getattr(rt.cudaError_t, name))
    for name in (
        "cudaErrorECCUncorrectable",
        "cudaErrorIllegalAddress",
        "cudaErrorLaunchTimeout",
        "cudaErrorAssert",
        "cudaErrorHardwareStackError",
        "cudaErrorIllegalInstruction",
        "cudaErrorMisalignedAddress",
        "cudaErrorInvalidAddressSpace",
        "cudaErrorInvalidPc",
        "cudaErrorLaunchFailure",
    )
}


THREAD_LOCAL = rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal


RELAXED = rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed


NOT_CAPTURING = rt.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone


ACTIVE = rt.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive


SUCCESS = rt.cudaError_t.cudaSuccess


class CudaCallError(AnabranchError):
    """A CUDA runtime call failed; ``code`` is its ``cudaError_t``."""

    def __init__(self, call: str, code: Any) -> None:
        super().__init__(f"{call} failed: {rt.cudaGetErrorString(code)[1].decode()} ({code.name})")
        self.error_code = int(code)


def checked(call: str, result: tuple[Any, ...]) -> Any:
    if result[0] != SUCCESS:
        raise CudaCallError(call, result[0])
    return result[1] if len(result) == 2 else result[1:]

"""Private streams, with what libraries keep for each, and the latch that holds streams still."""

from __future__ import annotations

from typing import ClassVar

import torch

from anabranch.devices._stream import Stream
from anabranch.devices.cuda._calls import checked, driver, rt
from anabranch.devices.cuda._driver import handle
from anabranch.devices.cuda._memory import CudaMemory
from anabranch.errors import AnabranchError


def new_stream(index: int) -> torch.cuda.Stream:
    # torch.cuda.Stream() would be one of 32 that strangers share.
    with torch.cuda.device(index):
        made = checked("cudaStreamCreateWithFlags", rt.cudaStreamCreateWithFlags(rt.cudaStreamNonBlocking))
    return torch.cuda.ExternalStream(int(made), device=index)


class CudaLane:
    """See :class:`anabranch.devices.Lane`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.stream = new_stream(index)
        self.hidden = CudaMemory(index)

    def load_workspaces(self) -> None:
        # PyTorch keeps one cuBLAS and one cuBLASLt workspace per (handle, stream), and a handle per thread. A first
        # product on this stream allocates them, here from the lane's own pool. Whoever clears all workspaces of the
        # process (PyTorch's own CUDA graph trees do) then gives these bytes back to a pool that only this lane
        # allocates from, so a graph that has their address baked in still owns them.
        with torch.cuda.stream(self.stream), self.hidden.using():
            a = torch.ones(8, 8, dtype=torch.half, device=f"cuda:{self.index}")
            torch.addmm(a[0], a, a)
            torch.mm(a, a)

    def hidden_nbytes(self) -> int:
        return self.hidden.nbytes()


class CudaLatch:
    """See :class:`anabranch.devices.Latch`. The stream waits for a word of host memory: no kernel has to spin."""

    #: Held streams look at the word whatever becomes of this object, so the words live as long as the process.
    _words: ClassVar[list[torch.Tensor]] = []

    def __init__(self) -> None:
        self._word = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._words.append(self._word)

    def hold(self, stream: Stream) -> None:
        address = int(checked("cudaHostGetDevicePointer", rt.cudaHostGetDevicePointer(self._word.data_ptr(), 0)))
        equal_or_greater = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        with torch.cuda.device(stream.device_index):
            error = driver.cuStreamWaitValue32(handle(stream), address, 1, int(equal_or_greater))[0]
        if error != driver.CUresult.CUDA_SUCCESS:
            raise AnabranchError(f"cuStreamWaitValue32 failed: {error.name}")

    def open(self) -> None:
        self._word[0] = 1

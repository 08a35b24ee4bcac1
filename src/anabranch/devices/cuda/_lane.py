"""Private streams, with what libraries keep for each, and the latch that holds streams still."""

from __future__ import annotations

from typing import ClassVar

import torch

from anabranch import _sync
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


class _Words:
    """Pinned words of 0, each handed out once. Threads: any may :meth:`take`.

    All come from one tensor. A pinned tensor for each latch would take the blocks of PyTorch's host allocator that
    ``Tensor.item()`` copies into, and with none left ``item()`` allocates: CUDA then waits for all streams, the held
    ones, too, which is for ever where the latch opens only afterwards. For the same reason there are many words: the
    next tensor of them may have to be made while streams are held.
    """

    _COUNT = 16384

    def __init__(self) -> None:
        self._lock = _sync.lock("words of latches")
        #: Held streams look at their word whatever becomes of the latch, so the tensors live as long as the process.
        self._tensors: list[torch.Tensor] = []
        self._taken = 0

    def take(self) -> torch.Tensor:
        """A tensor of one word."""
        with self._lock:
            number = self._taken % self._COUNT
            if not number:
                with torch.inference_mode(False):  # else only a latch that is opened in that mode could write
                    made = torch.zeros(self._COUNT, dtype=torch.int32, device="cpu", pin_memory=True)
                self._tensors.append(made)
            self._taken += 1
            return self._tensors[-1][number : number + 1]


class CudaLatch:
    """See :class:`anabranch.devices.Latch`. The stream waits for a word of host memory: no kernel has to spin."""

    _words: ClassVar[_Words] = _Words()

    def __init__(self) -> None:
        self._word = self._words.take()

    def hold(self, stream: Stream) -> None:
        address = int(checked("cudaHostGetDevicePointer", rt.cudaHostGetDevicePointer(self._word.data_ptr(), 0)))
        equal_or_greater = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        with torch.cuda.device(stream.device_index):
            error = driver.cuStreamWaitValue32(handle(stream), address, 1, int(equal_or_greater))[0]
        if error != driver.CUresult.CUDA_SUCCESS:
            raise AnabranchError(f"cuStreamWaitValue32 failed: {error.name}")

    def open(self) -> None:
        self._word[0] = 1

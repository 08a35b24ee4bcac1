"""The memory of the host and of the GPU, and what of it this process holds."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import torch


def host_memory() -> tuple[float, float]:
    """The host's memory, and what of it programs can still have, in gigabytes (1e9 bytes). (0, 0): not known."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            found[name] = float(rest.split()[0]) * 1024 / 1e9
    return found.get("MemTotal", 0.0), found.get("MemAvailable", 0.0)


def free_memory() -> str:
    """What the host and this process's GPU have free, as text for a report. Creates no context and never raises."""
    total, available = host_memory()
    parts = [f"host {available:.0f} of {total:.0f} GB free"]
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        parts.append(f"GPU {float(memory.free) / 1e9:.0f} of {float(memory.total) / 1e9:.0f} GB free")
    return ", ".join(parts)


def memory_mb(cuda: bool) -> float:
    """Megabytes that this process holds: on the device as its driver counts, else PyTorch's peak, else peak RAM."""
    if cuda:
        with contextlib.suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            # By its name: the driver's numbers know nothing of CUDA_VISIBLE_DEVICES.
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return float(process.usedGpuMemory) / 1e6
        return float(torch.cuda.max_memory_reserved()) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

"""The host's memory: how much of it there is, and how a virtual machine is made to bring all of it.

The memory of some virtual machines starts small and grows as it is used. A GPU's driver cannot wait for that: while a
host has little memory left, creating a context fails with "out of memory" or takes minutes, whatever the GPU has free.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from pathlib import Path

#: Touches so many gigabytes, tells so, and holds them until its standard input ends. Should memory run out, the kernel
#: ends this process before any other.
_TOUCH = """
import mmap, pathlib, sys
pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
held = []
for _ in range(int(float(sys.argv[1]) * 4)):
    held.append(mmap.mmap(-1, 1 << 28))
    for page in range(0, 1 << 28, 4096):
        held[-1][page] = 1
print("done", flush=True)
sys.stdin.read()
"""
#: Processes that touch memory at the same time.
_TOUCHING = 4


def host_memory() -> tuple[float, float]:
    """The host's memory now, and what of it programs can still have, in gigabytes (1e9 bytes). (0, 0): not known."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            found[name] = float(rest.split()[0]) * 1024 / 1e9
    return found.get("MemTotal", 0.0), found.get("MemAvailable", 0.0)


def grow_host_memory(gigabytes: float, seconds: float = 90.0) -> float:
    """Use ``gigabytes`` of the host's memory once and free it, unless so much is available already.

    Returns the seconds that it took. Ends after about ``seconds``, whatever has been reached by then. For hosts that
    are known to bring memory as it is used: on any other the processes that touch it are ended by the kernel.
    """
    start = time.monotonic()
    if host_memory()[1] >= gigabytes:
        return 0.0
    command = [sys.executable, "-c", _TOUCH, str(gigabytes / _TOUCHING)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(_TOUCHING)
    ]
    try:
        # Readable: it has touched its part, or was ended.
        waiting = [child.stdout for child in children if child.stdout is not None]
        while waiting:
            ready = select.select(waiting, [], [], max(0.0, start + seconds - time.monotonic()))[0]
            if not ready:
                break
            waiting = [output for output in waiting if output not in ready]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return time.monotonic() - start


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

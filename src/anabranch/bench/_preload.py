"""What the fork server imports, once for all workers. Nothing here may touch a device: forked processes could not.

``ANABRANCH_BENCH_PRELOAD=torch`` leaves the compilers out, should one of them come to touch the device at import.
"""

import contextlib
import os

# Read when Inductor is imported: with more than one it would start its own pool of compilers, here and now.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

with contextlib.suppress(Exception):
    import torchvision  # noqa: F401

if os.environ.get("ANABRANCH_BENCH_PRELOAD") != "torch":
    with contextlib.suppress(Exception):
        import torch._dynamo
        import torch._inductor.compile_fx
        import torch.export  # noqa: F401

"""What the fork server imports, once for all workers. Nothing here may touch a device: forked processes could not.

So the compilers stay out: importing PyTorch's looks at the GPU.
"""

import contextlib

import torch  # noqa: F401

with contextlib.suppress(Exception):
    import torchvision  # noqa: F401

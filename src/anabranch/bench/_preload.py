"""What the fork server imports, once for all workers. Nothing here may touch a device: forked processes could not."""

import contextlib

import torch  # noqa: F401

with contextlib.suppress(Exception):
    import torchvision  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: F401

"""anabranch: PyTorch inference engines that any thread may call on any CUDA stream."""

from anabranch._version import __version__
from anabranch.errors import AnabranchError

__all__ = ["AnabranchError", "__version__"]

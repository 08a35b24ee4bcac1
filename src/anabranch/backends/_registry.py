"""Which backends there are, by name."""

from __future__ import annotations

from anabranch.backends._backend import Backend
from anabranch.errors import BuildError

#: What ``compile(backend=...)`` takes.
BACKENDS = ("inductor", "eager", "tensorrt")


def get_backend(name: str) -> Backend:
    """The backend of that name, which is imported now."""
    if name == "inductor":
        from anabranch.backends import _inductor

        return _inductor.BACKEND
    if name == "eager":
        from anabranch.backends import _eager

        return _eager.BACKEND
    if name == "tensorrt":
        from anabranch.backends import tensorrt

        return tensorrt.BACKEND
    raise BuildError(f"backend {name!r} given; expected one of {', '.join(map(repr, BACKENDS))}")

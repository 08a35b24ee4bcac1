"""Running an engine: specializations, execution contexts, the pool that hands them out, the call itself."""

from anabranch.runtime._compile import Precision, compile
from anabranch.runtime._engine import Engine
from anabranch.runtime._flops import flops_of
from anabranch.runtime._session import Session
from anabranch.runtime._stats import Stats

__all__ = ["Engine", "Precision", "Session", "Stats", "compile", "flops_of"]

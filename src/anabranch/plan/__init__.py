"""The plan: an engine's steps, what each reads and writes, their order and their memory, as plain data."""

from anabranch.plan._plan import Access, Buffer, Edge, Plan, Step

__all__ = ["Access", "Buffer", "Edge", "Plan", "Step"]

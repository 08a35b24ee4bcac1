"""From a model to a flat graph: signatures of inputs, ``torch.export``, and what each output really is."""

from anabranch.export._program import (
    AliasOutput,
    ComputedOutput,
    ConstantOutput,
    Program,
    export_program,
    is_random,
    keep_backends_enabled,
    source_of,
)
from anabranch.export._signature import Input, Signature, TensorSpec, flatten_call, leaf_key, register_dataclasses

__all__ = [
    "AliasOutput",
    "ComputedOutput",
    "ConstantOutput",
    "Input",
    "Program",
    "Signature",
    "TensorSpec",
    "export_program",
    "flatten_call",
    "is_random",
    "keep_backends_enabled",
    "leaf_key",
    "register_dataclasses",
    "source_of",
]

"""From a model to a flat graph: signatures of inputs, ``torch.export``, and what each output really is."""

from anabranch.export._assignments import storage
from anabranch.export._bystanders import replaced, told_as_in_eager, undisturbed
from anabranch.export._containers import register_containers
from anabranch.export._diagnosis import NotExported, copy_of, describe, first_line
from anabranch.export._generators import generators_kept
from anabranch.export._hooks import about_hooks, hooks_of, name_of
from anabranch.export._indices import is_integer, valid_integer
from anabranch.export._isolation import Copies, run_in_eager
from anabranch.export._mixed import Mixed, Place, places, precision_of
from anabranch.export._mixing import Choices, Mixing, cast_of
from anabranch.export._narrow import BATCH_NORMS, EXACT, PRODUCTS, packet
from anabranch.export._number_tensors import tensorize
from anabranch.export._numbers import NotCarried, Numbers
from anabranch.export._outputs import (
    AliasOutput,
    ComputedOutput,
    ConstantOutput,
    NumberOutput,
    SizeOutput,
    finisher,
)
from anabranch.export._pieces import Cut, Piece, cut
from anabranch.export._places import written_by
from anabranch.export._precision import Cast
from anabranch.export._program import Program, export_program
from anabranch.export._proof import same_computation
from anabranch.export._quantized import NARROW, is_dequantized, is_quantization, quantized_lines
from anabranch.export._random import is_random
from anabranch.export._ranges import Run
from anabranch.export._room import Room, rooms
from anabranch.export._signature import (
    Input,
    Signature,
    TensorSpec,
    flatten_call,
    keyword_order_matters,
    layouts_of,
    leaf_key,
    shares_memory,
)
from anabranch.export._sizes import SPECIAL, Dim, Sizes, shape_at, size_at
from anabranch.export._snapshot import Fresh, Snapshot, alias
from anabranch.export._state import State, held_beside, writes_of
from anabranch.export._tree import map_leaves, map_tensors, unflatten
from anabranch.export._trial import changed_between, rehearse, state_of, written
from anabranch.export._uncaptured import READS_ON_HOST, Uncaptured, source_of

__all__ = [
    "BATCH_NORMS",
    "EXACT",
    "NARROW",
    "PRODUCTS",
    "READS_ON_HOST",
    "SPECIAL",
    "AliasOutput",
    "Cast",
    "Choices",
    "ComputedOutput",
    "ConstantOutput",
    "Copies",
    "Cut",
    "Dim",
    "Fresh",
    "Input",
    "Mixed",
    "Mixing",
    "NotCarried",
    "NotExported",
    "NumberOutput",
    "Numbers",
    "Piece",
    "Place",
    "Program",
    "Room",
    "Run",
    "Signature",
    "SizeOutput",
    "Sizes",
    "Snapshot",
    "State",
    "TensorSpec",
    "Uncaptured",
    "about_hooks",
    "alias",
    "cast_of",
    "changed_between",
    "copy_of",
    "cut",
    "describe",
    "export_program",
    "finisher",
    "first_line",
    "flatten_call",
    "generators_kept",
    "held_beside",
    "hooks_of",
    "is_dequantized",
    "is_integer",
    "is_quantization",
    "is_random",
    "keyword_order_matters",
    "layouts_of",
    "leaf_key",
    "map_leaves",
    "map_tensors",
    "name_of",
    "packet",
    "places",
    "precision_of",
    "quantized_lines",
    "register_containers",
    "rehearse",
    "replaced",
    "rooms",
    "run_in_eager",
    "same_computation",
    "shape_at",
    "shares_memory",
    "size_at",
    "source_of",
    "state_of",
    "storage",
    "tensorize",
    "told_as_in_eager",
    "undisturbed",
    "unflatten",
    "valid_integer",
    "writes_of",
    "written",
    "written_by",
]

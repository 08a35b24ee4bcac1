"""PyTorch's Inductor, ahead of time: no Dynamo, no guards, nothing that could recompile in the middle of a call."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from anabranch.backends._backend import Kernels, Options, Wrapped
from anabranch.backends._checks import keep_checks
from anabranch.backends._faults import avoid
from anabranch.backends._layouts import keep_layouts, keeping_strides
from anabranch.backends._single_query import reduce_single_queries
from anabranch.errors import BuildError
from anabranch.export import Program, replaced, undisturbed

_aten = torch.ops.aten
_CONVOLUTIONS = (
    *(_aten.conv2d.default, _aten.conv2d.padding, _aten.conv3d.default, _aten.conv3d.padding),
    _aten.convolution.default,
)


class _Inductor:
    name = "inductor"

    def lower(self, program: Program, examples: Sequence[torch.Tensor], options: Options) -> Kernels:
        from torch._C._dynamo.eval_frame import set_eval_frame
        from torch._dynamo.eval_frame import innermost_fn
        from torch._inductor import config, standalone_compile

        weights = tuple(program.weights)
        try:
            # fallback_random: random ops draw what eager would draw from the same generator.
            # optimize_scatter...: in PyTorch 2.11 that forgets the type of zeros.scatter(0, i, 1), and makes integers.
            settings: dict[str, object] = {
                "fallback_random": program.direct_only is not None,
                "optimize_scatter_upon_const_tensor": False,
                # PyTorch 2.11 pads the rows of temporaries on GPUs, and then may read one by strides that it had before
                # its layout was settled: other elements, and memory behind its end (pytorch#194281, #179931, #180848).
                "comprehensive_padding": False,
            }
            is_cuda = any(x.is_cuda for x in (*weights, *examples))
            rounding: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if _has_float16(program.module.graph):
                # Fused kernels keep in float32 what eager rounds after each operator: there infinities come of numbers
                # that overflow on their way.
                settings["emulate_precision_casts"] = True
                rounding = _products_added_at_once() if is_cuda else _rounding_kept()
            if is_cuda:
                # Triton's kernels make subnormal numbers 0, and divide by an estimate, which is 0 for large divisors.
                settings |= {"eager_numerics.disable_ftz": True, "eager_numerics.division_rounding": True}
                # A buffer that is written in place, or again, may be a result in the end: a call then has to tell each
                # kernel that writes to it where its result lies. In a CUDA graph the allocator re-uses memory as well.
                settings |= {"inplace_buffers": False, "allow_buffer_reuse": False}
                if program.sizes is not None and _is_better_channels_last(program):
                    # Inductor does so by itself for one shape, and not where sizes vary.
                    settings["force_layout_optimization"] = True
            wrappers: list[Any] = []
            with (
                config.patch(settings),
                _without_caches(program.sizes is not None),
                rounding,
                undisturbed(),
                _noting_wrappers(wrappers),
            ):
                module = copy.deepcopy(program.module)  # it is rewritten; the plan still shows the original
                keep_checks(module)
                avoid(module)
                reduce_single_queries(module)
                keep_layouts(module)
                given: list[Any] = [*weights, *examples]
                artifact = standalone_compile(
                    module,
                    given if program.sizes is None else _of_many_sizes(module),
                    dynamic_shapes="from_example_inputs" if program.sizes is None else "from_graph",
                    # Without this it runs every kernel once, to choose between variants, on values that it makes up:
                    # an index made of zeros can be out of range, which costs the process its GPU, and what is chosen
                    # on them is chosen again. So kernels choose where the engine is warmed up, on valid values.
                    options={"config_patches": {"triton.autotune_at_compile_time": False}},
                )
        except Exception as e:
            raise BuildError(
                f"Inductor could not compile the model: {type(e).__name__}: {e}. backend='eager' runs it without a"
                " compiler."
            ) from e

        # PyTorch wraps what it compiled in torch.compiler.disable. While any thread of the process exports a model,
        # this wrapper notes each call in one dict of all threads (torch.fx.traceback.current_meta): two calls at once
        # then raise KeyError, and the model under export gets notes about other code's calls. So the wrapper is taken
        # off, and the one thing that it is for, to keep Dynamo out, is done here.
        run = innermost_fn(getattr(artifact, "_compiled_fn", artifact))

        def kernels(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            before = set_eval_frame(None)
            try:
                return run(*weights, *inputs)
            finally:
                set_eval_frame(before)

        made = keeping_strides(program.module, kernels)
        # Of a program for many sizes: the others have their launches recorded.
        if program.sizes is None or len(wrappers) != 1:
            return made
        return Wrapped(made, wrappers[0], weights)


def _has_float16(graph: fx.Graph) -> bool:
    """Whether a graph computes in float16."""
    values = (n.meta.get("val") for n in graph.nodes if n.op == "call_function")
    return any(isinstance(v, torch.Tensor) and v.dtype is torch.float16 for v in values)


def _is_better_channels_last(program: Program) -> bool:
    """Whether a GPU's convolutions are faster if pictures lie in ``channels_last``: all but those in groups."""
    found = [n for n in program.module.graph.nodes if n.target in _CONVOLUTIONS]
    return bool(found) and not any(_is_in_groups(n) for n in found)


def _is_in_groups(convolution: fx.Node) -> bool:
    """Of several channels each: of one channel each they gain, too."""
    weight: Any = convolution.args[1]
    given = {a.name: x for a, x in zip(convolution.target._schema.arguments, convolution.args, strict=False)}  # type: ignore[union-attr]
    groups = convolution.kwargs.get("groups", given.get("groups", 1))
    return isinstance(groups, int) and groups > 1 and weight.meta["val"].shape[1] > 1


@contextlib.contextmanager
def _noting_wrappers(wrappers: list[Any]) -> Iterator[None]:
    """Note the functions that Inductor writes while this thread compiles."""
    graph: Any = importlib.import_module("torch._inductor.graph")
    here, before = threading.get_ident(), graph.GraphLowering.compile_to_module

    def noting(lowering: Any) -> Any:
        module = before(lowering)
        if threading.get_ident() == here:
            wrappers.append(getattr(getattr(module, "runner", None), "call", None) or module.call)
        return module

    with replaced(graph.GraphLowering, "compile_to_module", noting):
        yield


@contextlib.contextmanager
def _without_caches(is_so: bool) -> Iterator[None]:
    """Compile without what caches have kept of graphs: it comes without what was assumed of sizes when it was made.

    That nothing is going to be kept is a warning of Inductor's, which says nothing to a user.
    """
    if not is_so:
        yield
        return
    from torch._functorch import config as functorch
    from torch._inductor import config

    logger = logging.getLogger("torch._inductor.standalone_compile")

    def is_wanted(record: logging.LogRecord) -> bool:
        return "artifact generation failed" not in record.getMessage()

    logger.addFilter(is_wanted)
    try:
        with (
            config.patch({"fx_graph_cache": False, "fx_graph_remote_cache": False}),
            functorch.patch({"enable_autograd_cache": False, "enable_remote_autograd_cache": False}),
        ):
            yield
    finally:
        logger.removeFilter(is_wanted)


@contextlib.contextmanager
def _rounding_kept() -> Iterator[None]:
    """Have kernels for the CPU round where that is written. PyTorch 2.11 remembers what a rounded number was made of,
    and takes that where the number is read in the same kernel (pytorch#185337).

    Other threads compile as ever; and what they keep in caches is another entry.
    """
    cpp: Any = importlib.import_module("torch._inductor.codegen.cpp")
    here, before = threading.get_ident(), cpp.CppKernel.cache_dtype_convert

    def of_others(kernel: Any, *conversion: Any) -> None:
        if threading.get_ident() != here:
            before(kernel, *conversion)

    with replaced(cpp.CppKernel, "cache_dtype_convert", of_others), _kept_apart("rounding is kept"):
        yield


@contextlib.contextmanager
def _products_added_at_once() -> Iterator[None]:
    """Have Triton's kernels add to products without rounding them, as eager's kernels do. Inductor turns that off
    together with what keeps roundings between operators, which does not need it: convnext_tiny in float16 took 1.14
    times as long with both.

    Other threads compile as ever; and what they keep in caches is another entry.
    """
    triton: Any = importlib.import_module("torch._inductor.codegen.triton")
    here, before = threading.get_ident(), triton.TritonKernel.triton_meta_common

    def common(cls: Any) -> Any:
        made = before.__func__(cls)
        return {**made, "enable_fp_fusion": True} if threading.get_ident() == here else made

    kernel, name = triton.TritonKernel, "triton_meta_common"
    with replaced(kernel, name, classmethod(common)), _kept_apart("products are added at once"):
        yield


def _kept_apart(tag: str) -> contextlib.AbstractContextManager[None]:
    """While it is on, what is compiled is another entry of Inductor's caches."""
    config: Any = torch.compiler.config
    patch: contextlib.AbstractContextManager[None] = config.patch(cache_key_tag=f"{config.cache_key_tag}, {tag}")
    return patch


def _of_many_sizes(module: fx.GraphModule) -> list[Any]:
    """The fake tensors that ``module`` was traced on, to compile it for their symbols.

    What is assumed of these is then noted in the shape environment that they are from. Of real tensors Inductor makes
    other fake ones, with symbols of its own, and takes sizes that happen to be equal for one.
    """
    for node in module.graph.output_node().all_input_nodes:
        node.meta["example_value"] = node.meta["val"]  # where Inductor looks for the environment
    return [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]


BACKEND = _Inductor()

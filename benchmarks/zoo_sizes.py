"""The zoo with sizes that vary: each model compiled once for all of them, and compared with eager at six.

    python benchmarks/zoo_sizes.py --export --json benchmarks/results/zoo_sizes_list_cpu.json
    python benchmarks/zoo_sizes.py --list benchmarks/results/zoo_sizes_list_cpu.json --device cpu --backend eager \\
        --json benchmarks/results/zoo_sizes_cpu.json
    python benchmarks/zoo_sizes.py --merge a.json --merge b.json --json whole.json

``--export`` makes the list: the models of ``benchmarks/zoo_models.py`` that plain ``torch.export`` takes with
``Dim.DYNAMIC`` for the batch of each input, and with the lengths of texts, too; of the others it has the reason. The
libraries that are installed are looked at. ``--list`` takes the models from there: a model that anabranch refuses stays
one that counts. Which sizes vary is seen from the inputs: those that follow what :data:`CALLS` asks for.

Each model has a process of its own, in which it is compiled with declared sizes (:data:`BOUNDS`) and called with those
of :data:`CALLS`, twice: each size has five values there, 1 and both bounds among them. A model counts as right where
all results are as near float32 as ``benchmarks/zoo.py`` asks, are of eager's structure, and have the same bits the
second time. ``--missing FILE`` leaves out what the file has a verdict on.
"""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import torch
import zoo
import zoo_measure
import zoo_models
from torch.utils import _pytree as pytree
from zoo_models import Inputs, Sizes

import anabranch

Row = dict[str, Any]

BOUNDS = {"batch": (1, 8), "length": (1, 64), "target": (1, 16)}
#: Each column has five values.
CALLS = (
    Sizes(batch=8, length=64, target=16),
    Sizes(batch=1, length=33, target=7),
    Sizes(batch=2, length=1, target=5),
    Sizes(batch=5, length=17, target=1),
    Sizes(batch=3, length=40, target=11),
    Sizes(batch=1, length=1, target=1),
)
#: What ``torch.export`` is given: no size is 1, and no two are equal.
EXAMPLE = CALLS[4]
#: The library of each family.
LIBRARIES = {"tv": "torchvision", "timm": "timm", "hf": "transformers", "real": "transformers"}


# -- which sizes vary -------------------------------------------------------------------------------------------------


def varying(given: list[Inputs]) -> list[dict[int, str]]:
    """Of each tensor in the inputs that :data:`CALLS` has made: which of its dimensions vary, and with what.

    Raises ``LookupError`` where that is not to be seen.
    """
    calls = [[tuple(x.shape) for x in _tensors(i)] for i in given]
    if len(set(map(len, calls))) > 1:
        raise LookupError("a batch is a number of tensors, and no size of one")
    found = [
        {d: _name_of(seen) for d, seen in enumerate(zip(*shapes, strict=True)) if len(set(seen)) > 1}
        for shapes in zip(*calls, strict=True)
    ]
    if not all(found):
        raise LookupError("an input has no size that varies")
    return found


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, torch.Tensor)]


def _name_of(seen: tuple[int, ...]) -> str:
    for f in fields(Sizes):
        if seen == tuple(getattr(s, f.name) for s in CALLS):
            return f.name
    raise LookupError(f"a size of {seen} follows none that was asked for")


def _replaced(inputs: Inputs, names: list[dict[int, str]], make: Any, other: Any) -> Inputs:
    """Of each tensor ``make(tensor, names)``, of all else ``other(it)``."""
    left = iter(names)

    def one(x: Any) -> Any:
        return make(x, next(left)) if isinstance(x, torch.Tensor) else other(x)

    args = pytree.tree_map(one, inputs.args)
    return Inputs(args, pytree.tree_map(one, inputs.kwargs))


# -- one model, in this process ---------------------------------------------------------------------------------------


class Exported(zoo_measure.Subject):
    """Does plain ``torch.export`` take the model with sizes that vary?"""

    def _steps(self) -> None:
        with self._stage("make"):
            self.model, self.given = zoo_models.make(self.name, CALLS)
        with self._stage("inputs"):
            names = varying(self.given)
            self.row["inputs"] = [", ".join(f"{d}: {name}" for d, name in n.items()) for n in names]
        with self._stage("export"):
            example = self.given[CALLS.index(EXAMPLE)]
            dynamic = _replaced(example, names, lambda _, n: dict.fromkeys(n, torch.export.Dim.DYNAMIC), lambda _: None)
            # What a model takes as **kwargs has a level of its own.
            shapes = inspect.signature(self.model.forward).bind(*dynamic.args, **(dynamic.kwargs or {})).arguments
            torch.export.export(self.model, example.args, example.kwargs, dynamic_shapes=dict(shapes))


class Judged(zoo_measure.Subject):
    """Is what anabranch makes of it right at all sizes?"""

    def _steps(self) -> None:
        with self._stage("make"):
            self.model, self.given = zoo_models.make(self.name, CALLS)
            names = varying(self.given)
            self.row["sizes"] = sorted({name for n in names for name in n.values()})
        with self._stage("eager"):
            self._eager()
        with self._stage("build"):
            began = time.perf_counter()
            self._build_for_all(names)
            self.row["build_s"] = round(time.perf_counter() - began, 2)
        for sizes, inputs in zip(CALLS, self.sets, strict=True):
            at = ", ".join(f"{k} {v}" for k, v in asdict(sizes).items() if k in self.row["sizes"])
            with self._stage(f"the call of {at}"):
                self.engine_call(inputs)
        self.row["calls_s"] = round(time.perf_counter() - began, 2)
        with self._stage("serial calls"):
            self._serial()
        with self._stage("summary"):
            self.row["specializations"] = self.engine.stats().specializations
            self.row["backend"] = self.engine.summary()["backend"]
            self.row["alone"] = [line for line in self.engine.explain().splitlines() if "sizes vary" in line]

    def _build_for_all(self, names: list[dict[int, str]]) -> None:
        dims = {name: anabranch.Dim(name, *bounds) for name, bounds in BOUNDS.items()}

        def declared(x: torch.Tensor, of: dict[int, str]) -> anabranch.Input:
            shape = tuple(dims[of[d]] if d in of else n for d, n in enumerate(x.shape))
            return anabranch.Input(shape, x.dtype, x.device)

        inputs = _replaced(self.sets[0], names, declared, lambda x: x)
        self.engine = anabranch.compile(
            self.model, inputs=list(inputs.args), kwargs=inputs.kwargs, backend=self.options.backend
        )


# -- all of them ------------------------------------------------------------------------------------------------------


def taken(row: Row) -> Row:
    """The row of a model that was exported with its ``status`` and ``why``."""
    status, why = zoo.verdict(row)
    return {**row, "status": {"right": "taken", "failed": "not taken"}.get(status, status), "why": why}


def installed() -> list[str]:
    """The families whose libraries are here."""
    return [family for family, library in LIBRARIES.items() if importlib.util.find_spec(library) is not None]


def report(rows: list[Row]) -> str:
    good = [r for r in rows if r["status"] in ("right", "taken")]
    lines = [f"{r['model']}: {r['status']}: {r['why']}" for r in rows if r not in good]
    return "\n".join([*lines, f"{len(good)} of {len(rows)} {good[0]['status'] if good else 'right'}"])


@click.command(help=__doc__)
@click.option("--export", "lists", is_flag=True, help="Make a list; on the CPU.")
@click.option("--list", "file", type=click.Path(exists=True, path_type=Path), help="The list of models to judge.")
@click.option("--only", help="Names, with commas between them, instead of all.")
@click.option("--missing", type=click.Path(path_type=Path), help="Leave out what this file has a verdict on.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cuda", "cpu"]))
@click.option("--dtype", type=click.Choice(list(zoo.TOLERANCE)), help="Default: float16; on the CPU float32.")
@click.option("--backend", help="anabranch's backend; default: eager on the CPU, the device's best elsewhere.")
@click.option("--procs", default=1, show_default=True, help="Processes at a time.")
@click.option("--each", default=300.0, show_default=True, help="Seconds that a model may take.")
@click.option("--limit", default=540.0, show_default=True, help="Seconds that the run may take.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Where the results go.")
@click.option("--merge", "parts", type=click.Path(exists=True, path_type=Path), multiple=True, help="Run nothing.")
@click.option("--child", hidden=True)
def main(
    lists: bool,
    file: Path | None,
    only: str | None,
    missing: Path | None,
    target: Path | None,
    parts: tuple[Path, ...],
    child: str | None,
    procs: int,
    each: float,
    limit: float,
    **options: Any,
) -> None:
    if child is not None:
        zoo.child(child, Exported if lists else Judged)
        return
    if target is None:
        raise click.UsageError("--json FILE is needed: it says where the results go")
    if parts:
        whole = zoo.merge([zoo.read(p) for p in parts])
        zoo.write(target, whole)
        print(report(whole["rows"]))
        return
    if lists == (file is not None):
        raise click.UsageError("give --export, which makes a list, or --list FILE, which has one")
    if file is None:
        names = zoo_models.default_names(installed())
    else:
        names = [r["model"] for r in zoo.read(file)["rows"] if r["status"] == "taken"]
    names = only.split(",") if only else names
    if missing is not None and missing.exists():
        names = zoo.left_out(names, zoo.read(missing))
    on_cpu = lists or options["device"] == "cpu"
    options |= {"device": "cpu"} if lists else {}
    options["dtype"] = options["dtype"] or ("float32" if on_cpu else "float16")
    options["backend"] = options["backend"] or ("eager" if on_cpu else None)
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        chosen = asdict(zoo_measure.Options(**options, lock=str(Path(folder, "lock"))))
        judge = taken if lists else zoo.judged
        program = [__file__, "--export"] if lists else [__file__]
        rows = zoo.Run(names, chosen, target, each, limit, program, judge).run(procs)
    print(report(rows))


if __name__ == "__main__":
    main()

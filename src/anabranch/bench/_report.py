"""What a run is shown as: ratios, struck-out figures, the table in the terminal, and the tables of the docs."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from rich.table import Table

from anabranch._exit import NOT_JUDGED, RIGHT, WRONG
from anabranch.bench._statistics import ratio
from anabranch.bench._system import BASELINE
from anabranch.errors import CannotJudge

#: Struck-out figures that a summary lists one by one.
_MOST_ROWS = 12

Content = dict[str, Any]
CellData = dict[str, Any]


def median(cell: CellData, figure: str) -> float | None:
    """A figure's median: ``"p50_us"``, ``"p99_us"``, ``"host_us"``, or a number of streams for calls a second."""
    if figure.endswith("_us"):
        found = cell.get("latency", {}).get(figure)
    else:
        found = cell["throughput"].get(figure, {}).get("per_s")
    return found["median"] if found else None


def wrong(cell: CellData, figure: str, family: str) -> tuple[int, int]:
    """(wrong outputs, outputs checked) behind a figure. Ours promises the same bits, so there inexact is wrong.

    Those behind a latency are those of one stream: a call that does not do its work is quick.
    """
    row = cell["throughput"].get(figure if figure.isdigit() else "1")
    if row is None:
        return 0, 0
    return row["wrong"] + (row["inexact"] if family == "ours" else 0), row["checked"]


def right(cell: CellData, figure: str, family: str) -> bool:
    """Whether every output behind the figure was right."""
    return not cell.get("serially_wrong") and not wrong(cell, figure, family)[0]


def with_ratios(content: Content) -> Content:
    """Add, for each figure, which right peer is best, and each cell's ratio to it (above 1 is faster)."""
    figures = ["p50_us", "host_us", *map(str, content["settings"]["streams"])]
    for name, work in content["works"].items():
        cells = [c for c in content["cells"] if c["work"] == name]
        work["best_peer"] = {}
        for figure in figures:
            more = not figure.endswith("_us")
            peers = [
                (value, c["system"])
                for c in cells
                if content["systems"][c["system"]]["family"] == "peer"
                and right(c, figure, "peer")
                and (value := median(c, figure)) is not None
            ]
            best = (max if more else min)(peers, default=None)
            if best is not None:
                work["best_peer"][figure] = best[1]
            for cell in cells:
                value = median(cell, figure)
                found = ratio(value, best[0] if best else None, more) if value is not None else None
                if found is not None:
                    cell.setdefault("vs_best_peer", {})[figure] = float(f"{found:.4g}")
    return content


def number(value: float) -> str:
    """Three digits that matter, or all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def strike(cell: CellData, figure: str, family: str, rich: bool = False) -> str:
    """A figure as text: plain when right; struck out with the count beside it when not; what happened when missing."""
    value = median(cell, figure)
    if value is None:
        if figure in cell.get("without", {}):
            reason = str(cell["without"][figure])
            return reason if len(reason) < 32 else reason[:30] + "…"
        return "" if cell["status"] == "ok" else cell["status"]
    text = number(value)
    if right(cell, figure, family):
        return text
    bad, checked = wrong(cell, figure, family)
    if cell.get("serially_wrong"):
        note = (
            f"wrong by {cell['serial_error']}"
            if cell["serial_error"] == "inf"
            else f"off by {cell['serial_error']:.0%}"
        )
    else:
        note = f"{bad} of {checked} wrong"
    return f"[strike red]{text}[/] [bold red]{note}[/]" if rich else f"~~{text}~~ {note}"


def table(content: Content, work: str) -> Table:
    """One work: a line a system."""
    about = content["works"][work]
    shape = "x".join(map(str, about["shape"]))
    dtype = content["settings"]["dtype"]
    result = Table(title=f"{work}: {about['summary']} ({shape}, {dtype})", title_justify="left")
    result.add_column("system", no_wrap=True)
    for name in ("latency us", "p99", "host us"):
        result.add_column(name, justify="right", no_wrap=True)
    streams = [str(n) for n in content["settings"]["streams"]]
    for n in streams:
        result.add_column(f"calls/s, {n} stream{'s' * (n != '1')}", justify="right")
        result.add_column("x best", justify="right", style="dim")
    for name in ("build s", "first ms", "MB"):
        result.add_column(name, justify="right", no_wrap=True)
    for cell in (c for c in content["cells"] if c["work"] == work):
        system = content["systems"][cell["system"]]
        family = system["family"]
        style = {"ours": "bold green", "bound": "dim"}.get(family, "")
        if "latency" not in cell:
            text = (
                cell["status"] if cell["status"] in ("slow", "skipped", "unavailable") else f"[red]{cell['status']}[/]"
            )
            result.add_row(system["label"], text, style=style)
            continue
        row = [system["label"], *(strike(cell, f, family, rich=True) for f in ("p50_us", "p99_us", "host_us"))]
        for n in streams:
            against = cell.get("vs_best_peer", {}).get(n)
            text = strike(cell, n, family, rich=True)
            if cell["status"] != "ok" and median(cell, n) is None:
                text = f"[bold red]{cell['status']}[/]"
            row += [text, f"{against:.2f}" if against is not None and right(cell, n, family) else ""]
        row += [number(cell["build_s"]), number(cell["first_call_ms"]), f"{cell['memory_mb']:,.0f}"]
        result.add_row(*row, style=style)
    return result


def notes(content: Content) -> list[str]:
    """What did not go well, a line each: crashes with their last words, failures, builds that took too long."""
    lines = []
    for cell in content["cells"]:
        where = f"{cell['work']}, {content['systems'][cell['system']]['label']}"
        if cell["status"] not in ("ok", "unavailable"):
            lines.append(f"{where}: {cell['status']}: {cell.get('reason', '')}")
            last = cell.get("crash", {}).get("stderr", [])
            lines += [f"    {line}" for line in last[-2:]]
        for n, why in cell.get("without", {}).items():
            lines.append(f"{where}, {n} streams: {why}")
    return lines


def status(content: Content) -> int:
    """The exit status of a run: 1 where an output was wrong, 2 where a system's outputs could not be judged or the
    baseline or everything has no figures, else 0. What else crashed, hung or was not built in time is a result, and
    said as one."""
    cells = content["cells"]
    family = {name: about["family"] for name, about in content["systems"].items()}
    for cell in cells:
        figures = cell["throughput"] or ["1"]
        if cell.get("serially_wrong") or any(wrong(cell, n, family[cell["system"]])[0] for n in figures):
            return WRONG
    unjudged = any(CannotJudge.__name__ in c.get("reason", "") for c in cells)
    measured = not cells or any(c["status"] == "ok" for c in cells)
    return RIGHT if measured and not unjudged and not without_baseline(content) else NOT_JUDGED


def without_baseline(content: Content) -> list[str]:
    """Works on which the baseline was to be measured and has no figures, with the reason: such a run has failed."""
    return [
        f"{cell['work']}: {BASELINE} is {cell['status']}: {cell.get('reason', 'no reason given')}"
        for cell in content["cells"]
        if cell["system"] == BASELINE and "latency" not in cell
    ]


def _best(
    content: Content, work: str, figure: str, family: str, names: Sequence[str] = ("*",)
) -> tuple[float, CellData] | None:
    """The best right figure on a work of those of a family whose names fit one of the patterns."""
    found = [
        (value, i, c)
        for i, c in enumerate(content["cells"])
        if c["work"] == work
        and content["systems"][c["system"]]["family"] == family
        and any(fnmatchcase(c["system"], pattern) for pattern in names)
        and right(c, figure, family)
        and (value := median(c, figure)) is not None
    ]
    if not found:
        return None
    value, _, cell = min(found) if figure.endswith("_us") else max(found)
    return value, cell


def most(
    content: Content, work: str, family: str, names: Sequence[str] = ("*",), streams: int | None = None
) -> tuple[float, CellData, str] | None:
    """The most right calls a second, as :func:`_best`, on any number of streams up to ``streams``; whose; on how many.

    Not with the most streams alone: who holds an engine for each thread may have fewer of them.
    """
    found = [
        (*best, str(n))
        for n in content["settings"]["streams"]
        if (streams is None or n <= streams) and (best := _best(content, work, str(n), family, names)) is not None
    ]
    return max(found, key=lambda f: f[0], default=None)


def summary(content: Content) -> str:
    """Every work with the best right peer, ours and the bound, in Markdown; then a table of the wrong systems."""
    lines = [
        "| work | latency, us: best right peer | ours | ratio | calls/s: best right peer; streams | ours; streams"
        " | ratio | bound; streams |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in content["works"]:
        peer, ours = _best(content, name, "p50_us", "peer"), _best(content, name, "p50_us", "ours")
        parts = [
            name,
            f"{number(peer[0])} ({content['systems'][peer[1]['system']]['label']})" if peer else "none",
            number(ours[0]) if ours else "none",
            _against(ours, peer, more_is_better=False),
        ]
        rate, our_rate, bound = (most(content, name, family) for family in ("peer", "ours", "bound"))
        parts += [
            f"{number(rate[0])} ({content['systems'][rate[1]['system']]['label']}); {rate[2]}" if rate else "none",
            f"{number(our_rate[0])}; {our_rate[2]}" if our_rate else "none",
            _against(our_rate, rate, more_is_better=True),
            f"{number(bound[0])}; {bound[2]}" if bound else "",
        ]
        lines.append("| " + " | ".join(parts) + " |")
    lines += ["", *_wrong_lines(content), *_origin(content)]
    return "\n".join(lines)


def overview(content: Content) -> str:
    """The README's table, in Markdown: a line a work, with the best right peer, ours, their ratio, and our errors.

    A ratio below 1 is a loss. The last column counts every output of ours that was wrong, in all of our systems.
    """
    lines = [
        "| work | latency, us: best right peer | anabranch | ratio | calls/s: best right peer | anabranch | ratio |"
        " wrong outputs of anabranch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in content["works"]:
        parts = [name]
        for more in (False, True):
            peer, ours = (
                most(content, name, family) if more else _best(content, name, "p50_us", family)
                for family in ("peer", "ours")
            )
            parts += [
                f"{number(peer[0])} ({_product(content, peer[1])})" if peer else "none",
                number(ours[0]) if ours else "none",
                _against(ours, peer, more_is_better=more),
            ]
        mine = [
            c for c in content["cells"] if c["work"] == name and content["systems"][c["system"]]["family"] == "ours"
        ]
        rows = [wrong(cell, n, "ours") for cell in mine for n in cell["throughput"]]
        count = f"{sum(bad for bad, _ in rows):,} of {sum(checked for _, checked in rows):,}"
        # The concurrent outputs of such a system are compared with a serial one that is wrong itself.
        serial = sum(bool(cell.get("serially_wrong")) for cell in mine)
        parts.append(count + (f", and {serial} of {len(mine)} serial outputs" if serial else ""))
        lines.append("| " + " | ".join(parts) + " |")
    where, settings = content["environment"], content["settings"]
    lines += [
        "",
        f"{where['device']}, PyTorch {where['torch']}, {settings['dtype']}, batch 1, {where['date'][:10]}. With a"
        " ratio above 1 anabranch is faster, below 1 slower. Calls/s: the best of"
        f" {_listed(settings['streams'])} streams.",
    ]
    return "\n".join(lines)


def _product(content: Content, cell: CellData) -> str:
    """A peer's name without its set-up: "Torch-TensorRT" for every runtime and mode of it."""
    label: str = content["systems"][cell["system"]]["label"]
    return label.split(" C++")[0].split(" Python")[0]


def _listed(values: Sequence[Any]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _against(ours: tuple[Any, ...] | None, peer: tuple[Any, ...] | None, more_is_better: bool) -> str:
    found = ratio(ours[0], peer[0], more_is_better) if ours and peer else None
    return f"**{found:.2f}**" if found is not None else ""


def _wrong_lines(content: Content) -> list[str]:
    """A table of every struck-out figure, when there is one; when there are many, a line a system."""
    rows = []
    systems: dict[str, list[tuple[str, int, int]]] = {}
    for cell in content["cells"]:
        system = content["systems"][cell["system"]]
        for n in cell["throughput"]:
            if not right(cell, n, system["family"]):
                text = strike(cell, n, system["family"])
                rows.append(f"| {cell['work']} | {system['label']} | {n} | {text} |")
                systems.setdefault(system["label"], []).append((cell["work"], *wrong(cell, n, system["family"])))
    if not rows:
        return ["No system had a wrong output.", ""]
    if len(rows) <= _MOST_ROWS:
        return ["| struck out: work | system | streams | calls/s |", "|---|---|---|---|", *rows, ""]
    lines = ["| struck out | figures | works | outputs of these that were wrong |", "|---|---|---|---|"]
    for label, found in systems.items():
        works, bad, checked = {w for w, _, _ in found}, sum(b for _, b, _ in found), sum(c for _, _, c in found)
        lines.append(f"| {label} | {len(found)} | {len(works)} | {bad:,} of {checked:,} |")
    return [*lines, ""]


def _origin(content: Content) -> list[str]:
    where, settings = content["environment"], content["settings"]
    crashed = [c for c in content["cells"] if c["status"] == "crashed"]
    # A run with a limit may not have come to all of its rounds.
    rounds = sorted(
        {r["per_s"]["rounds"] for c in content["cells"] for r in c["throughput"].values()}
        | {c["latency"]["p50_us"]["rounds"] for c in content["cells"] if "latency" in c}
    ) or [0]
    count = str(rounds[0]) if rounds[0] == rounds[-1] else f"{rounds[0]} to {rounds[-1]}"
    systems = len({c["system"] for c in content["cells"] if c["status"] not in ("unavailable",)})
    return [
        f"Ratio: above 1 is better than the best peer whose outputs were all right. {systems} systems,"
        f" {settings['dtype']}, batch 1; medians of {count} round{'s' * (count != '1')};"
        f" {sum(r['checked'] for c in content['cells'] for r in c['throughput'].values()):,} outputs checked;"
        f" {len(crashed)} crash{'es' * (len(crashed) != 1)}. {where['device']}, PyTorch {where['torch']},"
        f" {where['date'][:10]}."
    ]


def families(content: Content, names: Sequence[str]) -> dict[str, str]:
    """System -> the group that the plot draws it in."""
    groups = {}
    for name in names:
        family = content["systems"][name]["family"]
        if family != "peer":
            groups[name] = family
        elif name.startswith("trt-"):
            groups[name] = "Torch-TensorRT"
        elif name == "eager":
            groups[name] = "eager"
        else:
            groups[name] = {"onnxruntime": "ONNX Runtime"}.get(name, "torch.compile, AOTInductor")
    return groups

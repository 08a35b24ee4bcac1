"""One picture of a run: how fast everyone is relative to the fastest peer that was right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anabranch.bench._report import families, right, wrong
from anabranch.errors import InputError

_STYLE = {
    "ours": ("*", "#e8590c", 190),
    "Torch-TensorRT": ("o", "#2f9e44", 42),
    "torch.compile, AOTInductor": ("s", "#1971c2", 36),
    "ONNX Runtime": ("D", "#9c36b5", 36),
    "eager": ("^", "#868e96", 42),
    "bound": ("|", "#000000", 220),
}
_LABEL = {"ours": "anabranch", "bound": "graph and buffers per stream, one thread (a bound, not a product)"}


def plot(content: dict[str, Any], target: Path) -> None:
    """Write the picture to ``target``. Needs matplotlib.

    A panel for latency and one for the throughput of the most streams; a row a work. Right of the line is faster than
    the best peer whose outputs were all right; a red cross is a figure with wrong outputs.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise InputError("--plot needs matplotlib: pip install 'anabranch[bench]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    works = list(content["works"])
    groups = families(content, list(content["systems"]))
    streams = [str(n) for n in content["settings"]["streams"]]
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 1.6 + 0.55 * len(works)), sharey=True, layout="constrained")
    drawn: dict[str, Any] = {}
    for panel, title in zip(
        panels, ("latency, one call at a time", f"calls a second, {streams[-1]} streams"), strict=True
    ):
        panel.axvline(1.0, color="#adb5bd", linewidth=1.2, zorder=0)
        for row, work in enumerate(works):
            panel.axhline(row, color="#f1f3f5", linewidth=9, zorder=-1)
            name = "p50_us"
            if panel is panels[1]:
                # The most streams that this work was measured with.
                cells = [c for c in content["cells"] if c["work"] == work]
                name = next((n for n in reversed(streams) if any(n in c["throughput"] for c in cells)), streams[-1])
                if name != streams[-1]:
                    panel.text(
                        1.01, row, f"{name} streams", transform=panel.get_yaxis_transform(), va="center", fontsize=8
                    )
            for cell in (c for c in content["cells"] if c["work"] == work):
                value = cell.get("vs_best_peer", {}).get(name)
                if value is None:
                    continue
                group = groups[cell["system"]]
                marker, color, size = _STYLE[group]
                family = content["systems"][cell["system"]]["family"]
                if not right(cell, name, family):
                    drawn["wrong outputs"] = panel.scatter(
                        value, row, marker="x", c="#e03131", s=60, linewidths=2.2, zorder=4
                    )
                    bad, checked = wrong(cell, name, family)
                    if checked:
                        panel.annotate(
                            f"{100 * bad / checked:.0f}%", (value, row), xytext=(0, 6), textcoords="offset points",
                            ha="center", fontsize=7, color="#e03131",
                        )  # fmt: skip
                    continue
                order = 3 if group == "ours" else 2
                alpha = 1.0 if group in ("ours", "bound") else 0.75
                drawn[_LABEL.get(group, group)] = panel.scatter(
                    value, row, marker=marker, c=color, s=size, alpha=alpha, zorder=order, linewidths=1.4
                )
        panel.set_xscale("log", base=2)
        panel.set_title(title, fontsize=11)
        panel.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:.3g}x"))
        panel.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    panels[0].set_yticks(range(len(works)), works)
    panels[0].invert_yaxis()
    where = content["environment"]
    figure.suptitle(
        f"Speed relative to the fastest peer whose outputs were all right (right is faster). {where['device']}",
        fontsize=11,
    )
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)

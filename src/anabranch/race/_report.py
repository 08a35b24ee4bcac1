"""A report: which bytes, which two accesses, which order is missing, and the smallest change that adds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from anabranch.race import _advice


@dataclass(frozen=True)
class Site:
    """Where an event stands: its line in the trace, its source line if the event gave one, and its host thread."""

    line: int
    thread: str
    source: str | None = None

    @property
    def where(self) -> str:
        return self.source or f"line {self.line}"

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Site:
        return cls(line=facts["line"], thread=facts["thread"], source=facts["source"])


@dataclass(frozen=True)
class Access:
    """One side of a report: an event, what it did and where.

    ``do`` is the event's name; ``mode`` is ``read``, ``write`` or None (a call that accesses no memory).
    """

    do: str
    site: Site
    mode: str | None = None
    buffer: str | None = None
    stream: str | None = None
    graph: str | None = None
    lock: str | None = None
    item: int = 0

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Access:
        return cls(
            do=facts["do"],
            site=Site.from_facts(facts),
            mode=facts.get("mode"),
            buffer=facts.get("buffer"),
            stream=facts.get("stream"),
            graph=facts.get("graph"),
            lock=facts.get("lock"),
            item=facts.get("item", 0),
        )

    @property
    def on_host(self) -> bool:
        return self.do == "host"

    def __str__(self) -> str:
        what = self.do
        if self.do == "replay":
            what = f"replay of graph `{self.graph}`"
        elif self.do == "host":
            what = "the host"
        if self.mode and self.buffer:
            what = f"{self.mode} of `{self.buffer}` by {what}"
        elif self.mode:
            what = f"{self.mode} by {what}"
        stream = f", stream `{self.stream}`" if self.stream else ""
        lock = f" holding lock `{self.lock}`" if self.lock else ""
        return f"{what}{stream}, thread `{self.site.thread}`{lock}, at {self.site.where}"


@dataclass(frozen=True)
class Allocation:
    """Where a buffer came from: its ``alloc`` (``declared``), or its first use when the trace has none."""

    declared: bool
    site: Site
    stream: str | None
    reuses: str | None
    freed: Site | None

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Allocation:
        return cls(
            declared=facts["declared"],
            site=Site.from_facts(facts),
            stream=facts["stream"],
            reuses=facts["reuses"],
            freed=Site.from_facts(facts["freed"]) if facts["freed"] else None,
        )

    def __str__(self) -> str:
        if not self.declared:
            text = f"no alloc in the trace; first named at {self.site.where}"
        else:
            text = f"allocated {f'on stream `{self.stream}`' if self.stream else 'as host memory'} at {self.site.where}"
        if self.reuses:
            text += f" in the block of `{self.reuses}`"
        if self.freed:
            text += f", freed at {self.freed.where}"
        return text


@dataclass(frozen=True)
class Report:
    """One distinct race or stale use.

    ``kind`` is ``race`` or ``capture`` (verdict ``race``), or one of ``use-after-free``, ``replay-after-free``,
    ``record-after-free``, ``double-free``, ``dead-stream``, ``dead-stream-free``, ``double-destroy`` (verdict
    ``stale``; ``released`` is then where the thing died and ``second`` the use). ``start`` and ``stop`` are bytes of
    the second access' buffer; ``stop`` is None for its end. ``missing`` says which order is missing, ``fix`` is the
    smallest change, as lines of code.
    """

    kind: str
    verdict: Literal["race", "stale"]
    second: Access
    missing: str
    fix: tuple[str, ...]
    first: Access | None = None
    released: Site | None = None
    buffer: str | None = None
    start: int = 0
    stop: int | None = None
    allocated: Allocation | None = None
    first_allocated: Allocation | None = None

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Report:
        kind = facts["kind"]

        def allocation(key: str) -> Allocation | None:
            return Allocation.from_facts(facts[key]) if facts.get(key) else None

        allocated, before = allocation("allocated"), allocation("first_allocated")
        if facts["verdict"] == "stale":
            use = Access.from_facts(facts["use"])
            released = Site.from_facts(facts["released"])
            missing, fix = _advice.stale(kind, facts["buffer"], use, released, allocated, facts["owner"])
            return cls(
                kind=kind,
                verdict="stale",
                second=use,
                missing=missing,
                fix=fix,
                released=released,
                buffer=facts["buffer"],
                allocated=allocated,
            )
        first, second = Access.from_facts(facts["first"]), Access.from_facts(facts["second"])
        if kind == "capture":
            missing, fix = _advice.capture(first, second)
            return cls(kind=kind, verdict="race", first=first, second=second, missing=missing, fix=fix)
        missing, fix = _advice.race(first, second, allocated, before, facts["covered"])
        return cls(
            kind=kind,
            verdict="race",
            first=first,
            second=second,
            missing=missing,
            fix=fix,
            buffer=facts["buffer"],
            start=facts["start"],
            stop=facts["stop"],
            allocated=allocated,
            first_allocated=before,
        )

    @property
    def subject(self) -> str:
        """What it is about: the buffer and its bytes, the stream, or the capture."""
        if self.kind == "capture":
            captured = self.first if self.first and self.first.stream else self.second
            return f"capture on stream `{captured.stream}`"
        if self.buffer is None:
            return f"stream `{self.second.stream}`"
        if self.stop is None:
            return f"`{self.buffer}`" + (f", bytes from {self.start}" if self.start else ", whole buffer")
        return f"`{self.buffer}`, bytes [{self.start}, {self.stop})"

    def __str__(self) -> str:
        rows: list[tuple[str, str]] = []
        if self.first is not None:
            rows.append(("first", str(self.first)))
            rows.append(("second", str(self.second)))
        else:
            word = "destroyed" if self.buffer is None else "freed"
            if self.kind == "dead-stream-free":
                word = "destroyed"
            assert self.released is not None
            rows.append((word, f"thread `{self.released.thread}`, at {self.released.where}"))
            rows.append(("use", str(self.second)))
        if self.allocated is not None:
            rows.append(("buffer", f"`{self.buffer}`: {self.allocated}"))
        if self.first_allocated is not None and self.first is not None:
            rows.append(("", f"`{self.first.buffer}`: {self.first_allocated}"))
        rows.append(("missing", self.missing))
        rows.extend(("fix" if i == 0 else "", line) for i, line in enumerate(self.fix))
        title = self.verdict if self.kind == self.verdict else f"{self.verdict} ({self.kind})"
        return "\n".join([f"{title}: {self.subject}", *(f"  {key:<10}{value}".rstrip() for key, value in rows)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the text of the report beside the facts."""
        return {**asdict(self), "fix": list(self.fix), "text": str(self)}

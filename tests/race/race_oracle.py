"""A second opinion that shares nothing with the detector: the whole happens-before graph, and reachability.

Quadratic and slow on purpose. Nodes are host calls and queued items, edges go forward, and the ancestors of a node are
the bits of one integer. Every pair of accesses is compared; nothing is ever pruned.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

INFINITE = 1 << 63
_LIMIT = 1 << 62
_RANGE = re.compile(r"([^\[\]]+)(?:\[([0-9]{1,19}):([0-9]{1,19})\])?", re.ASCII)


class Malformed(Exception):
    pass


@dataclass(eq=False)
class Stream:
    device: int = 0
    blocking: bool = False
    legacy: bool = False
    declared: bool = False
    dead: bool = False
    ends: list[int] = field(default_factory=list)  # latest item (two after an alias joined two streams)


@dataclass(eq=False)
class Instance:
    storage: int
    base: int = 0
    size: int = INFINITE
    declared: bool = False
    accessed: bool = False
    freed: bool = False
    recorded: list[Stream] = field(default_factory=list)


@dataclass(eq=False)
class Access:
    node: int
    storage: int
    write: bool
    live: list[tuple[int, int]]
    released: list[tuple[int, int]] = field(default_factory=list)


@dataclass(eq=False)
class Graph:
    ranges: list[tuple[Instance, int, int | None, bool]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


def minus(spans: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    out = []
    for a, b in spans:
        out += [(a, min(b, start))] if a < start else []
        out += [(max(a, stop), b)] if b > stop else []
    return [(a, b) for a, b in out if a < b]


def overlap(spans: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    return [(max(a, start), min(b, stop)) for a, b in spans if max(a, start) < min(b, stop)]


class Oracle:
    def __init__(self) -> None:
        self.ancestors: list[int] = []
        self.thread_end: dict[str, int] = {}
        self.thread_next: dict[str, list[int]] = {}  # edges into a thread's next call
        self.streams: dict[str, Stream] = {}
        self.all_streams: list[Stream] = []
        self.events: dict[str, int] = {}
        self.unlocks: dict[str, list[int]] = {}
        self.signals: dict[str, list[int]] = {}
        self.awaiting: dict[str, str] = {}
        self.buffers: dict[str, Instance] = {}
        self.storages = 0
        self.graphs: dict[str, Graph] = {}
        self.accesses: list[Access] = []
        self.captures: list[dict[str, Any]] = []
        self.unsafe: list[tuple[str, int]] = []
        self.race = False
        self.stale = False

    # -- the graph ----------------------------------------------------------------------------------------------
    def node(self, before: list[int]) -> int:
        bits = 0
        for b in before:
            bits |= self.ancestors[b] | 1 << b
        self.ancestors.append(bits)
        return len(self.ancestors) - 1

    def reaches(self, a: int, b: int) -> bool:
        return a == b or bool(self.ancestors[b] >> a & 1)

    def call(self, thread: str, more: list[int] = []) -> int:  # noqa: B006
        before = self.thread_next.pop(thread, []) + more
        if thread in self.thread_end:
            before.append(self.thread_end[thread])
        self.thread_end[thread] = self.node(before)
        return self.thread_end[thread]

    def stream(self, name: str) -> Stream:
        if name not in self.streams:
            self.streams[name] = Stream(legacy=name == "legacy")
            self.all_streams.append(self.streams[name])
        return self.streams[name]

    def implicit(self, stream: Stream) -> list[int]:
        """Last items of the streams that the legacy rule orders before this one's next item."""
        return [
            end
            for other in self.all_streams
            if other.device == stream.device
            and ((stream.legacy and other.blocking) or (stream.blocking and other.legacy))
            for end in other.ends
        ]

    def queue(self, name: str, call: int, more: list[int] = []) -> int:  # noqa: B006
        stream = self.stream(name)
        self.stale |= stream.dead
        item = self.node([call, *stream.ends, *self.implicit(stream), *more])
        stream.ends = [item]
        return item

    # -- memory -------------------------------------------------------------------------------------------------
    def buffer(self, name: str) -> Instance:
        if name not in self.buffers:
            self.storages += 1
            self.buffers[name] = Instance(self.storages)
        return self.buffers[name]

    def access(self, node: int, instance: Instance, start: int, stop: int | None, write: bool) -> None:
        if stop is not None and start >= stop:
            return
        self.stale |= instance.freed
        instance.accessed = True
        end = instance.base + (instance.size if stop is None else stop)
        lo, hi = instance.base + start, min(end, INFINITE)
        if lo >= hi:
            return
        for old in self.accesses:
            if (
                old.storage == instance.storage
                and (old.write or write)
                and overlap(old.live, lo, hi)
                and not self.reaches(old.node, node)
            ):
                self.race = True
        self.accesses.append(Access(node, instance.storage, write, [(lo, hi)]))

    # -- events -------------------------------------------------------------------------------------------------
    def feed(self, e: dict[str, Any]) -> None:
        do, thread = e["do"], e.get("thread") or "T0"
        waiting = self.awaiting.pop(thread, None)
        del waiting
        if do == "stream":
            self.call(thread)
            s = self.stream(e["stream"])
            if s.dead and not s.legacy:
                del self.streams[e["stream"]]
                s = self.stream(e["stream"])
            s.dead = False
            s.declared, s.device = True, e.get("device") or 0
            s.blocking = not s.legacy and e.get("kind") == "blocking"
        elif do == "alias":
            self.call(thread)
            target, old = self.stream(e["of"]), self.streams.get(e["stream"])
            if old is target:
                return
            if old is not None and not old.dead:
                target.ends = target.ends + old.ends
                if old.declared and not target.declared:
                    target.declared, target.device, target.blocking = True, old.device, old.blocking
                old.blocking = False
                self.all_streams.remove(old)
                for instance in self.instances():
                    instance.recorded = [target if s is old else s for s in instance.recorded]
                for capture in self.captures:
                    capture["stream"] = target if capture["stream"] is old else capture["stream"]
                for name in self.streams:
                    if self.streams[name] is old:
                        self.streams[name] = target
            self.streams[e["stream"]] = target
            target.legacy |= e["stream"] == "legacy" or (old is not None and old.legacy)
            target.blocking &= not target.legacy
        elif do in ("op", "host"):
            call = self.call(thread)
            node = call if do == "host" else self.queue(e["stream"], call)
            for mode in ("reads", "writes"):
                for name, start, stop in map(split, e[mode]):
                    self.access(node, self.buffer(name), start, stop, mode == "writes")
        elif do == "graph":
            self.call(thread)
            graph = self.graphs.setdefault(e["graph"], Graph())
            graph.ranges = [
                (self.buffer(n), a, b, mode == "writes")
                for mode in ("reads", "writes")
                for n, a, b in map(split, e[mode])
            ]
        elif do == "replay":
            graph = self.graphs.setdefault(e["graph"], Graph())
            node = self.queue(e["stream"], self.call(thread), graph.ends)
            graph.ends = [node]
            for instance, start, stop, write in graph.ranges:
                self.access(node, instance, start, stop, write)
        elif do == "record":
            self.events[e["event"]] = self.queue(e["stream"], self.call(thread))
        elif do == "wait":
            call = self.call(thread)
            if e["event"] in self.events:
                self.queue(e["stream"], call, [self.events[e["event"]]])
            else:
                self.stale |= self.stream(e["stream"]).dead
        elif do == "sync":
            before: list[int] = []
            if e.get("on") is not None:
                if e["on"] in self.events:
                    before.append(self.events[e["on"]])
                s2 = self.streams.get(e["on"]) or (self.stream("legacy") if e["on"] == "legacy" else None)
                if s2 is not None:
                    self.stale |= s2.dead and e["on"] not in self.events
                    before += s2.ends + self.implicit(s2)
            else:
                before += [end for s in self.all_streams if s.device == e["device"] for end in s.ends]
            self.call(thread, before)
        elif do == "alloc":
            self.call(thread)
            self.alloc(split(e["buffer"])[0], e.get("reuses"))
        elif do == "free":
            call = self.call(thread)
            b = self.buffer(split(e["buffer"])[0])
            if b.freed:
                self.stale = True
                return
            self.stale |= any(s.dead for s in b.recorded)
            b.freed = True
            done = [end for s in b.recorded for end in s.ends] + [call]
            b.recorded = []
            for a in self.accesses:
                if a.storage == b.storage and any(self.reaches(a.node, d) for d in done):
                    a.released += overlap(a.live, b.base, min(b.base + b.size, INFINITE))
        elif do == "record_stream":
            self.call(thread)
            b, s = self.buffer(split(e["buffer"])[0]), self.stream(e["stream"])
            if b.freed:
                self.stale = True
            else:
                b.recorded.append(s)
        elif do == "lock":
            self.call(thread, list(self.unlocks.get(e["lock"], [])))
        elif do == "unlock":
            self.unlocks.setdefault(e["lock"], []).append(self.call(thread))
        elif do == "start":
            call = self.call(thread)
            self.thread_next.setdefault(e["of"], []).append(call)
        elif do == "join":
            ends = [self.thread_end[e["of"]]] if e["of"] in self.thread_end else []
            self.call(thread, self.thread_next.get(e["of"], []) + ends)
        elif do == "signal":
            call = self.call(thread)
            given = self.signals.setdefault(e["on"], [])
            given.append(call)
            for waiter in [t for t, on in self.awaiting.items() if on == e["on"]]:
                del self.awaiting[waiter]
                self.thread_next.setdefault(waiter, []).append(call)
        elif do == "await":
            given = self.signals.get(e["on"], [])
            self.call(thread, list(given))
            if not given:
                self.awaiting[thread] = e["on"]
        elif do == "begin_capture":
            call = self.call(thread)
            stream = self.stream(e["stream"])
            self.stale |= stream.dead
            is_global = e["mode"] == "global"
            if is_global and any(t != thread and not self.reaches(n, call) for t, n in self.unsafe):
                self.race = True
            for c in self.captures:
                if c["end"] is None and c["stream"] is stream and c["thread"] == thread:
                    self.captures.remove(c)
                    break
            self.captures.append({"stream": stream, "thread": thread, "global": is_global, "end": None})
        elif do == "end_capture":
            call = self.call(thread)
            stream = self.stream(e["stream"])
            found = [c for c in self.captures if c["end"] is None and c["stream"] is stream]
            own = [c for c in found if c["thread"] == thread]
            if found:
                (own or found)[-1 if own else 0]["end"] = call
        elif do == "unsafe_call":
            call = self.call(thread)
            for c in self.captures:
                if c["global"] and c["thread"] != thread and (c["end"] is None or not self.reaches(c["end"], call)):
                    self.race = True
            self.unsafe.append((thread, call))
        else:
            self.call(thread)
            s = self.stream(e["stream"])
            self.stale |= s.dead
            s.dead = True

    def instances(self) -> list[Instance]:
        seen = {id(i): i for i in self.buffers.values()}
        seen |= {id(i): i for g in self.graphs.values() for i, *_ in g.ranges}
        return list(seen.values())

    def alloc(self, name: str, reuses: str | None) -> None:
        if not reuses:
            known = self.buffers.get(name)
            if known is not None and not (known.declared or known.accessed or known.freed):
                known.declared = True
                return
            self.storages += 1
            self.buffers[name] = Instance(self.storages, declared=True)
            return
        base, start, stop = split(reuses)
        old = self.buffer(base)
        lo = min(old.base + start, INFINITE)
        hi = min(old.base + (old.size if stop is None else min(stop, old.size)), INFINITE)
        size = INFINITE if hi == INFINITE else max(hi - lo, 0)
        self.buffers[name] = Instance(old.storage, lo, size, declared=True)
        for a in self.accesses:
            if a.storage == old.storage:
                for s, t in overlap(a.released, lo, hi):
                    a.live = minus(a.live, s, t)

    @property
    def verdict(self) -> str:
        return "race" if self.race else "stale" if self.stale else "clean"


def split(text: str) -> tuple[str, int, int | None]:
    found = _RANGE.fullmatch(text)
    if found is None:
        raise Malformed(text)
    if found[2] is None:
        return found[1], 0, None
    start, stop = int(found[2]), int(found[3])
    if start > stop or stop > _LIMIT:
        raise Malformed(text)
    return found[1], start, stop


_NAMES = {
    "stream": ["stream"],
    "alias": ["stream", "of"],
    "op": ["stream"],
    "graph": ["graph"],
    "replay": ["graph", "stream"],
    "host": [],
    "record": ["event", "stream"],
    "wait": ["stream", "event"],
    "sync": [],
    "alloc": ["buffer"],
    "free": ["buffer"],
    "record_stream": ["buffer", "stream"],
    "lock": ["lock"],
    "unlock": ["lock"],
    "start": ["of"],
    "join": ["of"],
    "signal": ["on"],
    "await": ["on"],
    "begin_capture": ["stream"],
    "end_capture": ["stream"],
    "unsafe_call": [],
    "destroy": ["stream"],
}


def parse(line: str) -> dict[str, Any]:
    """The event on a line, by the standard library's reader and the rules of docs/race.md; raises Malformed."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        known = [k for k, _ in pairs]
        if any(known.count(k) > 1 for k in known):
            raise Malformed("twice")
        return dict(pairs)

    try:
        e = json.loads(line, object_pairs_hook=once)
    except ValueError as error:
        raise Malformed(str(error)) from None

    def name(key: str, *, optional: bool = False) -> None:
        if optional and e.get(key) is None:
            return
        if not isinstance(e.get(key), str) or not e[key]:
            raise Malformed(key)

    if not isinstance(e, dict) or not isinstance(e.get("do"), str) or e["do"] not in _NAMES:
        raise Malformed("do")
    do = e["do"]
    name("thread", optional=True)
    name("source", optional=True)
    for key in _NAMES[do]:
        name(key)
        if key == "buffer":
            split(e[key])
    if do in ("op", "graph", "host"):
        for key in ("reads", "writes"):
            if not isinstance(e.get(key), list):
                raise Malformed(key)
            for item in e[key]:
                if not isinstance(item, str):
                    raise Malformed(key)
                split(item)

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if do == "stream":
        if e.get("kind") not in (None, "blocking", "nonblocking"):
            raise Malformed("kind")
        if e.get("device") is not None and not whole(e["device"]):
            raise Malformed("device")
    if do == "sync":
        if (e.get("on") is None) == (e.get("device") is None):
            raise Malformed("on")
        name("on", optional=True)
        if e.get("device") is not None and not whole(e["device"]):
            raise Malformed("device")
    if do == "alloc":
        if "stream" not in e:
            raise Malformed("stream")
        name("stream", optional=True)
        name("reuses", optional=True)
        if e.get("reuses") is not None:
            split(e["reuses"])
    if do == "begin_capture" and e.get("mode") not in ("global", "thread_local", "relaxed"):
        raise Malformed("mode")
    return e


def judge(lines: list[str]) -> str:
    """The verdict of a trace, or ``malformed``."""
    oracle = Oracle()
    try:
        for line in lines:
            if line.strip():
                oracle.feed(parse(line))
    except Malformed:
        return "malformed"
    return oracle.verdict

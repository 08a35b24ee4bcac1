"""Random small traces: few names, so that they meet; weights drawn per trace, so that traces differ in kind."""

from __future__ import annotations

import json
import random
from typing import Any

_KINDS = (
    "op", "host", "replay", "graph", "record", "wait", "sync", "alloc", "free", "record_stream", "lock", "unlock",
    "start", "join", "signal", "await", "stream", "alias", "destroy", "begin_capture", "end_capture", "unsafe_call",
)  # fmt: skip
_WEIGHTS = (30, 6, 6, 4, 12, 14, 8, 7, 5, 3, 3, 3, 1, 2, 2, 2, 2, 1, 1, 1, 1, 1)


def trace(rng: random.Random) -> list[str]:
    """The lines of one trace; about one in nine is malformed somewhere."""
    lines = [json.dumps(event) for event in events(rng)]
    if lines and rng.random() < 0.12:
        at = rng.randrange(len(lines))
        lines[at] = spoil(rng, lines[at])
    return lines


def events(rng: random.Random) -> list[dict[str, Any]]:
    threads = [f"T{i}" for i in range(rng.choice((1, 1, 1, 2, 2, 3)))]
    streams = [f"s{i}" for i in range(rng.choice((1, 2, 2, 3)))] + ["legacy"] * (rng.random() < 0.25)
    buffers = [f"b{i}" for i in range(rng.choice((1, 2, 3, 5)))]
    named = [f"e{i}" for i in range(2)]
    graphs = ["G", "H"]
    ranged = rng.random() < 0.3
    tidy = rng.random() < 0.6  # order added by a pattern, not by luck
    weights = [w * rng.choice((0, 1, 1, 2)) for w in _WEIGHTS]
    weights[0] += 4
    out: list[dict[str, Any]] = []

    def access() -> str:
        name = rng.choice(buffers)
        if ranged and rng.random() < 0.6:
            lo = rng.randrange(0, 13, 4)
            return f"{name}[{lo}:{lo + rng.choice((0, 4, 4, 8, 12))}]"
        return name

    def accesses() -> dict[str, list[str]]:
        return {
            "reads": [access() for _ in range(rng.choice((0, 1, 1, 2)))],
            "writes": [access() for _ in range(rng.choice((0, 0, 1, 1, 2)))],
        }

    if rng.random() < 0.35:
        for s in streams:
            if s != "legacy" or rng.random() < 0.2:
                kind, device = rng.choice(("blocking", "nonblocking")), rng.choice((0, 0, 1))
                out.append({"do": "stream", "stream": s, "kind": kind, "device": device})
    for _ in range(rng.randrange(2, 22)):
        do = rng.choices(_KINDS, weights)[0]
        e: dict[str, Any] = {"do": do}
        stream = rng.choice(streams)
        if do in ("op", "record", "wait", "replay", "record_stream", "begin_capture", "end_capture"):
            e["stream"] = stream
        if do in ("op", "graph", "host"):
            e |= accesses()
        if do in ("graph", "replay"):
            e["graph"] = rng.choice(graphs)
        if do in ("record", "wait"):
            e["event"] = rng.choice(named)
        if do == "sync":
            e |= rng.choice(({"on": stream}, {"on": rng.choice(named)}, {"device": rng.choice((0, 0, 1))}))
        if do in ("alloc", "free", "record_stream"):
            e["buffer"] = access() if rng.random() < 0.2 else rng.choice(buffers)
        if do == "alloc":
            e["stream"] = rng.choice((stream, stream, None))
            if rng.random() < 0.7:
                e["reuses"] = access()
        if do in ("lock", "unlock"):
            e["lock"] = rng.choice(("m", "n"))
        if do in ("start", "join"):
            e["of"] = rng.choice(threads)
        if do in ("signal", "await"):
            e["on"] = rng.choice(("go", "done"))
        if do == "stream":
            e |= {"stream": stream, "kind": rng.choice(("blocking", "nonblocking"))}
        if do == "alias":
            e |= {"stream": rng.choice([*streams, "other"]), "of": stream}
        if do == "destroy":
            e["stream"] = rng.choice([s for s in streams if s != "legacy"] or ["s0"])
        if do == "begin_capture":
            e["mode"] = rng.choice(("global", "global", "thread_local", "relaxed"))
        if rng.random() < 0.9:
            e["thread"] = rng.choice(threads)
        out.append(e)
        if tidy and do in ("op", "replay") and rng.random() < 0.6:
            thread = {k: e[k] for k in ("thread",) if k in e}
            out.append({"do": "record", "event": "e0", "stream": e["stream"], **thread})
            out.append({"do": "wait", "event": "e0", "stream": rng.choice(streams), **thread})
    return out


def spoil(rng: random.Random, line: str) -> str:
    """One line, made malformed (nearly always)."""
    e = json.loads(line)
    key = rng.choice(list(e))
    how = rng.randrange(8)
    if how == 0:
        del e[key]
    elif how == 1:
        e[key] = rng.choice((None, 3, -1, "", [], {}, True, ["x", 1], 0.5))
    elif how == 2:
        return line[: rng.randrange(len(line))]
    elif how == 3:
        return line + rng.choice(("}", "x", ",", "{}", "]"))
    elif how == 4:
        e["do"] = rng.choice(("opp", "Op", "wait_event", ""))
    elif how == 5:
        for field in ("reads", "writes"):
            if isinstance(e.get(field), list):
                e[field].append(rng.choice(("a[8:0]", "a[-1:4]", "a[0:", "a[]", "[0:8]", "a[1:2]b", "", "a[0:4][4:8]")))
    elif how == 6:
        at = rng.randrange(1, len(line))
        return line[:at] + rng.choice('{}[]",:\\') + line[at:]
    else:
        return line[:-1] + f', "{key}": "again"}}'
    return json.dumps(e)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """A trace file, damaged: lines or words moved about, so that it often still parses, or bytes of any kind."""
    if rng.random() < 0.5:
        return _shuffle(rng, data)
    out = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        if not out:
            break
        at = rng.randrange(len(out))
        how = rng.randrange(5)
        if how == 0:
            out[at] = rng.randrange(256)
        elif how == 1:
            del out[at : at + rng.randrange(1, 20)]
        elif how == 2:
            stop = min(len(out), at + rng.randrange(1, 60))
            out[at:at] = out[at:stop]
        elif how == 3:
            out[at:at] = rng.choice(_TOKENS)
        else:
            out = out[:at]
    return bytes(out)


_TOKENS = (
    b'"', b"\\", b"\\u12", b"{", b"[", b"[0:9]", b"[9:0]", b"\n", b"\x00", b"\xff", b"9" * 30, b"null", b"[" * 99,
)  # fmt: skip


def _shuffle(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    for _ in range(rng.randrange(1, 6)):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        how = rng.randrange(4)
        if how == 0:
            lines[i], lines[j] = lines[j], lines[i]
        elif how == 1:
            lines.insert(i, lines[j])
        elif how == 2 and len(lines) > 1:
            del lines[i]
        else:
            # A word of one line takes the place of a word of another: names meet that never met.
            words, others = lines[i].split(b'"'), lines[j].split(b'"')
            if len(words) > 4 and len(others) > 4:
                at = rng.randrange(3, len(words), 2) if rng.random() < 0.9 else rng.randrange(len(words))
                words[at] = others[rng.randrange(3, len(others), 2)]
                lines[i] = b'"'.join(words)
    return b"\n".join(lines)

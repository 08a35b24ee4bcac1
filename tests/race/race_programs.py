"""Small stream programs of our own, each with its verdict and, where there is one, its repaired twin.

One event a line or between semicolons: ``op s a b > c`` reads a and b and writes c on stream s; ``host a > b``;
``rs t s`` is record_stream; ``T1| ...`` is issued by thread T1 (T0 otherwise); the rest is as in the trace format.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Program(NamedTuple):
    name: str
    verdict: str
    text: str
    repaired: str = ""


def parse(text: str) -> list[dict[str, Any]]:
    """The events of a program."""
    out = []
    for line in text.replace("\n", ";").split(";"):
        if not line.strip():
            continue
        thread, _, rest = line.rpartition("|")
        do, *words = rest.split()
        event = _event(do, words)
        if thread.strip():
            event["thread"] = thread.strip()
        out.append(event)
    return out


def _event(do: str, words: list[str]) -> dict[str, Any]:
    def lists(items: list[str]) -> dict[str, Any]:
        cut = items.index(">")
        return {"reads": items[:cut], "writes": items[cut + 1 :]}

    if do == "op":
        return {"do": "op", "stream": words[0], **lists(words[1:])}
    if do == "host":
        return {"do": "host", **lists(words)}
    if do == "graph":
        return {"do": "graph", "graph": words[0], **lists(words[1:])}
    if do == "stream":
        return {"do": "stream", "stream": words[0], "kind": words[1], "device": int(words[2]) if words[2:] else 0}
    if do == "sync":
        return (
            {"do": "sync", "device": int(words[0][3:])}
            if words[0].startswith("dev")
            else {"do": "sync", "on": words[0]}
        )
    if do == "alloc":
        event = {"do": "alloc", "buffer": words[0], "stream": None if words[1] == "-" else words[1]}
        return {**event, "reuses": words[2]} if words[2:] else event
    keys = {
        "alias": ("stream", "of"),
        "replay": ("graph", "stream"),
        "record": ("event", "stream"),
        "wait": ("stream", "event"),
        "free": ("buffer",),
        "rs": ("buffer", "stream"),
        "lock": ("lock",),
        "unlock": ("lock",),
        "start": ("of",),
        "join": ("of",),
        "signal": ("on",),
        "await": ("on",),
        "begin_capture": ("stream", "mode"),
        "end_capture": ("stream",),
        "unsafe_call": (),
        "destroy": ("stream",),
    }[do]
    assert len(keys) == len(words), (do, words)
    return {"do": "record_stream" if do == "rs" else do, **dict(zip(keys, words, strict=True))}


PROGRAMS = [
    # -- events ---------------------------------------------------------------------------------------------------
    Program(
        "wait for an event that was never recorded",
        "race",
        "op a > x; wait b e; record e a; op b x >",
        "op a > x; record e a; wait b e; op b x >",
    ),
    Program(
        "event recorded before the work it should cover",
        "race",
        "record e a; op a > x; wait b e; op b x >",
        "op a > x; record e a; wait b e; op b x >",
    ),
    Program(
        "one shared event, recorded again by another stream before the wait",
        "race",
        "op a > x; record e a; op c > z; record e c; wait b e; op b x >",
        "op a > x; record ea a; op c > z; record ec c; wait b ea; op b x >",
    ),
    Program(
        "a second record does not move a wait that was queued",
        "race",
        "op a > x; record e a; wait b e; op a > x; record e a; op b x >",
        "op a > x; record e a; wait b e; op a > x; record e a; wait b e; op b x >",
    ),
    Program(
        "the wait is on the wrong stream",
        "race",
        "op a > x; record e a; wait c e; op b x >",
        "op a > x; record e a; wait c e; record f c; wait b f; op b x >",
    ),
    Program(
        "host synchronizes an event that was never recorded",
        "race",
        "op a > x; sync e; host x >",
        "op a > x; record e a; sync e; host x >",
    ),
    Program(
        "host synchronizes an event recorded too early",
        "race",
        "record e a; op a > x; sync e; host x >",
        "op a > x; record e a; sync e; host x >",
    ),
    Program("order through a third stream", "clean", "op a > x; record e a; wait c e; record f c; wait b f; op b x >"),
    Program(
        "write after read on another stream",
        "race",
        "op a x > y; op b > x",
        "op a x > y; record e a; wait b e; op b > x",
    ),
    # -- host -----------------------------------------------------------------------------------------------------
    Program(
        "pinned source refilled while its copy is pending",
        "race",
        "alloc H -; host > H; op s H > d; host > H",
        "alloc H -; host > H; op s H > d; sync s; host > H",
    ),
    Program(
        "host reads after synchronizing another stream",
        "race",
        "op a > H; sync b; host H >",
        "op a > H; sync a; host H >",
    ),
    Program(
        "the sync is another thread's",
        "race",
        "op a > H; T1| sync a; host H >",
        "op a > H; T1| sync a; T1| signal done; await done; host H >",
    ),
    Program(
        "a worker synchronizes before it ends",
        "clean",
        "start T1; T1| op a > H; T1| sync a; join T1; host H >",
    ),
    Program(
        "a worker ends without synchronizing",
        "race",
        "start T1; T1| op a > H; join T1; host H >",
        "start T1; T1| op a > H; join T1; sync a; host H >",
    ),
    Program(
        "another thread's binding is read while the first one queues",
        "race",
        "T1| host > ctx; T2| host > ctx; T1| host ctx >; T1| op s x > y",
        "T1| lock m; T1| host > ctx; T1| host ctx >; T1| op s x > y; T1| unlock m;"
        "T2| lock m; T2| host > ctx; T2| unlock m",
    ),
    Program(
        "two locks are not one",
        "race",
        "T1| lock m; T1| host > q; T1| unlock m; T2| lock n; T2| host > q; T2| unlock n",
        "T1| lock m; T1| host > q; T1| unlock m; T2| lock m; T2| host > q; T2| unlock m",
    ),
    Program(
        "the host touches a list after it released the lock",
        "race",
        "T1| lock m; T1| unlock m; T1| host > q; T2| lock m; T2| host q >; T2| unlock m",
    ),
    Program(
        "a lock orders the threads, not the queued work",
        "race",
        "T1| lock m; T1| op a > ws; T1| unlock m; T2| lock m; T2| op b > ws; T2| unlock m",
        "T1| lock m; T1| op a > ws; T1| sync a; T1| unlock m; T2| lock m; T2| op b > ws; T2| unlock m",
    ),
    Program(
        "work queued by one thread reads what another wrote on the host",
        "race",
        "T1| host > H; T2| op s H > d",
        "T1| host > H; T1| signal ready; T2| await ready; T2| op s H > d",
    ),
    Program(
        "the signal came before the write",
        "race",
        "T1| signal ready; T1| host > H; T2| await ready; T2| host H >",
        "T1| host > H; T1| signal ready; T2| await ready; T2| host H >",
    ),
    Program("an await blocks until its signal", "clean", "T2| await go; T1| host > H; T1| signal go; T2| host H >"),
    Program(
        "await joins every signal so far",
        "clean",
        "T1| host > a; T1| signal go; T2| host > b; T2| signal go; await go; host a b >",
    ),
    Program("two threads read at once", "clean", "T1| host x >; T2| host x >; op s x >; op t x >"),
    Program("a thread before it starts another", "clean", "host > x; start T1; T1| host x > x; join T1; host x >"),
    # -- byte ranges ----------------------------------------------------------------------------------------------
    Program(
        "ranges that overlap by one byte",
        "race",
        "op a > x[0:9]; op b > x[8:16]",
        "op a > x[0:8]; op b > x[8:16]",
    ),
    Program(
        "the whole buffer meets every range",
        "race",
        "op a > x[100:200]; op b x >",
        "op a > x[100:200]; sync a; op b x >",
    ),
    Program("an empty range touches nothing", "clean", "op a > x; op b x[4:4] >; op b > x[0:0]"),
    Program("empty lists touch nothing", "clean", "op a > x; op b >; host >"),
    Program("one op may read and write the same bytes", "clean", "op a x > x; op a x x > x x"),
    Program(
        "the second half is read before it is joined",
        "race",
        "op a > x[0:8]; op b > x[8:16]; record e a; wait c e; op c x >",
        "op a > x[0:8]; op b > x[8:16]; record e a; wait c e; record f b; wait c f; op c x >",
    ),
    # -- allocator ------------------------------------------------------------------------------------------------
    Program(
        "allocated on a side stream, first used on another",
        "race",
        "alloc t aux; op aux > t; free t; alloc u aux t; op main > u",
        "alloc t aux; op aux > t; free t; alloc u aux t; record e aux; wait main e; op main > u",
    ),
    Program(
        "history survives a free and a chain of reuse",
        "race",
        "alloc t s; op side t >; free t; alloc u s t; free u; alloc v s u; op s > v",
        "alloc t s; op side t >; rs t side; free t; alloc u s t; free u; alloc v s u; op s > v",
    ),
    Program(
        "record_stream covers what was queued by the free, not what came before the call only",
        "clean",
        "alloc t s; rs t side; op side t >; free t; alloc u s t; op s > u",
    ),
    Program(
        "record_stream of a slice is for its whole block",
        "clean",
        "alloc H -; host > H; op s H[0:8] > d; rs H[0:8] s; free H; alloc K - H; host > K",
    ),
    Program(
        "record_stream for the wrong stream",
        "race",
        "alloc t s; op side t >; rs t other; free t; alloc u s t; op s > u",
        "alloc t s; op side t >; rs t side; free t; alloc u s t; op s > u",
    ),
    Program(
        "the reuse of one block orders nothing else",
        "race",
        "alloc t s; op side t > H; rs t side; free t; alloc u s t; op s > u; host H >",
        "alloc t s; op side t > H; rs t side; free t; alloc u s t; op s > u; sync side; host H >",
    ),
    Program(
        "the same name, allocated again in the same bytes",
        "race",
        "alloc t s; op side t >; free t; alloc t s t; op s > t",
        "alloc t s; op side t >; record e side; wait s e; free t; alloc t s t; op s > t",
    ),
    Program("the same name in a fresh block", "clean", "alloc t s; op side t >; free t; alloc t s; op s > t"),
    Program(
        "a block freed by one thread after its sync, reused by another",
        "clean",
        "T1| alloc t s; T1| op side > t; T1| sync side; T1| free t; T2| alloc u s t; T2| op s > u",
    ),
    Program(
        "a split block: only one half is still read",
        "race",
        "alloc t s; op side t[0:8] >; free t; alloc u s t[8:16]; op s > u; alloc v s t[0:8]; op s > v",
        "alloc t s; op side t[0:8] >; free t; alloc u s t[8:16]; op s > u",
    ),
    Program(
        "pinned block recorded for one of its two streams",
        "race",
        "alloc H -; host > H; op a H >; op b H >; rs H a; free H; alloc K - H; host > K",
        "alloc H -; host > H; op a H >; op b H >; rs H a; rs H b; free H; alloc K - H; host > K",
    ),
    Program(
        "queued after the free",
        "stale",
        "alloc t s; op s > t; free t; op s t >",
        "alloc t s; op s > t; op s t >; free t",
    ),
    Program(
        "host use after the free",
        "stale",
        "alloc H -; host > H; free H; host H >",
        "alloc H -; host > H; host H >; free H",
    ),
    Program("freed twice", "stale", "alloc t s; op s > t; free t; free t", "alloc t s; op s > t; free t"),
    Program("record_stream after the free", "stale", "alloc t s; free t; rs t side", "alloc t s; rs t side; free t"),
    Program(
        "stale and unordered is a race",
        "race",
        "alloc t s; op s > t; free t; alloc u s t; op s > u; op side t >",
    ),
    # -- graphs ---------------------------------------------------------------------------------------------------
    Program(
        "static input refilled on another stream while the graph runs",
        "race",
        "graph G in > out; replay G s; op cpy x > in; record e cpy; wait s e; replay G s",
        "graph G in > out; replay G s; record d s; wait cpy d; op cpy x > in; record e cpy; wait s e; replay G s",
    ),
    Program("launches of one graph on two streams", "clean", "graph G in > out; replay G a; replay G b"),
    Program(
        "two graphs share a workspace on two streams",
        "race",
        "graph G a > ws; graph H b > ws; replay G s; replay H t",
        "graph G a > ws1; graph H b > ws2; replay G s; replay H t",
    ),
    Program(
        "output read on another stream than the launch",
        "race",
        "graph G in > out; replay G a; op b out > y",
        "graph G in > out; replay G a; record e a; wait b e; op b out > y",
    ),
    Program(
        "replay after a weight was freed",
        "stale",
        "alloc w s; graph G w > out; replay G s; free w; replay G s",
        "alloc w s; graph G w > out; replay G s; replay G s; free w",
    ),
    Program(
        "the freed weight's name means a new block now",
        "stale",
        "alloc w s; graph G w > out; replay G s; free w; alloc w s w; op s > w; replay G s",
        "alloc w s; graph G w > out; replay G s; free w; alloc w s w; op s > w; graph G w > out; replay G s",
    ),
    Program(
        "a graph given new addresses keeps its launches in order",
        "clean",
        "graph G in > out; replay G a; graph G in2 > out; replay G b",
    ),
    Program(
        "new addresses, old ones still in use",
        "race",
        "graph G in > out; replay G a; graph G in2 > out; replay G b; op c > in",
        "graph G in > out; replay G a; graph G in2 > out; replay G b; record e b; wait c e; op c > in",
    ),
    # -- captures -------------------------------------------------------------------------------------------------
    Program(
        "an innocent call during another thread's global capture",
        "race",
        "begin_capture c global; T1| unsafe_call; end_capture c",
        "begin_capture c thread_local; T1| unsafe_call; end_capture c",
    ),
    Program(
        "the call came first, and nothing makes the capture wait for it",
        "race",
        "T1| unsafe_call; begin_capture c global; end_capture c",
        "T1| lock m; T1| unsafe_call; T1| unlock m; lock m; begin_capture c global; end_capture c; unlock m",
    ),
    Program(
        "the call comes after the begin, not after the end",
        "race",
        "begin_capture c global; signal on; end_capture c; T1| await on; T1| unsafe_call",
        "begin_capture c global; end_capture c; signal on; T1| await on; T1| unsafe_call",
    ),
    Program("a thread's own call", "clean", "begin_capture c global; unsafe_call; end_capture c"),
    Program("relaxed mode", "clean", "begin_capture c relaxed; T1| unsafe_call; end_capture c"),
    # -- legacy stream --------------------------------------------------------------------------------------------
    Program(
        "weights on the legacy stream, read on a non-blocking one",
        "race",
        "stream s nonblocking; op legacy > w; op s w > y",
        "stream s blocking; op legacy > w; op s w > y",
    ),
    Program("legacy work waits for blocking streams", "clean", "stream b blocking; op b > x; op legacy x >"),
    Program("two blocking streams are not ordered", "race", "stream a blocking; stream b blocking; op a > x; op b x >"),
    Program(
        "legacy work between two blocking streams joins them",
        "clean",
        "stream a blocking; stream b blocking; op a > x; op legacy >; op b x >",
    ),
    Program(
        "a blocking stream of another device",
        "race",
        "stream b blocking 1; op legacy > x; op b x >",
        "stream b blocking 1; op legacy > x; record e legacy; wait b e; op b x >",
    ),
    Program(
        "an alias of the legacy stream", "clean", "stream b blocking; alias default legacy; op default > x; op b x >"
    ),
    # -- streams and devices --------------------------------------------------------------------------------------
    Program("two names of one stream", "clean", "alias t s; op s > x; op t x >"),
    Program(
        "a sync of one device",
        "race",
        "stream a nonblocking 0; stream b nonblocking 1; op a > x; op b > y; sync dev0; host x y >",
        "stream a nonblocking 0; stream b nonblocking 1; op a > x; op b > y; sync dev0; sync dev1; host x y >",
    ),
    Program(
        "peer copy unordered with its source",
        "race",
        "stream a nonblocking 0; stream b nonblocking 1; op a > x; op b x > y",
        "stream a nonblocking 0; stream b nonblocking 1; op a > x; record e a; wait b e; op b x > y",
    ),
    Program(
        "a new thread's current stream is the default one",
        "race",
        "op user > x; start T1; T1| op dflt x > y; join T1",
        "op user > x; record e user; start T1; T1| wait dflt e; T1| op dflt x > y; join T1",
    ),
    Program(
        "work queued on a destroyed stream", "stale", "op s > x; destroy s; op s x >", "op s > x; op s x >; destroy s"
    ),
    Program("an event recorded on a destroyed stream", "stale", "op s > x; destroy s; record e s"),
    Program("a dead stream by its other name", "stale", "alias t s; op s > x; destroy s; op t x >"),
    Program("destroyed twice", "stale", "op s > x; destroy s; destroy s", "op s > x; destroy s"),
    Program(
        "a new stream under a dead one's name", "clean", "op s > x; sync s; destroy s; stream s nonblocking; op s x >"
    ),
    Program(
        "the host synchronizes a destroyed stream",
        "stale",
        "op s > x; destroy s; sync s",
        "op s > x; sync s; destroy s",
    ),
    Program("an event outlives its stream", "clean", "op s > x; record e s; destroy s; wait t e; op t x >"),
    Program(
        "freed after its recorded stream died",
        "stale",
        "alloc t s; rs t side; destroy side; free t",
        "alloc t s; rs t side; free t; destroy side",
    ),
    Program(
        "replay on a destroyed stream",
        "stale",
        "graph G a > b; replay G s; destroy s; replay G s",
        "graph G a > b; replay G s; replay G s; destroy s",
    ),
]

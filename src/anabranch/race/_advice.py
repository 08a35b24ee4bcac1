"""What a report advises: the missing order in words, and the smallest change as code.

The code uses PyTorch's names (``record_event``, ``wait_event``, ``record_stream``, ``synchronize``); streams, events
and buffers keep the names of the trace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anabranch.race._report import Access, Allocation, Site

Advice = tuple[str, tuple[str, ...]]


def _code(*rows: tuple[str, str]) -> tuple[str, ...]:
    width = max(len(line) for line, _ in rows)
    return tuple(f"{line:<{width}}  # {comment}" for line, comment in rows)


def race(
    first: Access, second: Access, allocated: Allocation | None, before: Allocation | None, covered: int
) -> Advice:
    """Two unordered accesses. ``before`` is where the first one's buffer came from when it is not the second's."""
    if before is not None and before.freed is not None and first.site.line < before.freed.line < second.site.line:
        reused = _reused_block(first, second, before)
        if reused is not None:
            return reused
    here, there = second.site, first.site
    if first.on_host and second.on_host:
        return _threads(first, second)
    if first.on_host:
        missing = (
            f"thread `{here.thread}` queues {here.where} without any order after what thread `{there.thread}` did on "
            f"the host at {there.where}"
        )
        return missing, _code(
            ("ready.set()", f"thread {there.thread}, after {there.where}; ready = threading.Event()"),
            ("ready.wait()", f"thread {here.thread}, before {here.where}"),
        )
    if second.on_host:
        missing = _lag(f"thread `{here.thread}`", first, covered)
        return missing, _code((f"{first.stream}.synchronize()", f"thread {here.thread}, before {here.where}"))
    missing = _lag(f"stream `{second.stream}`", first, covered)
    record = f"after {there.where}"
    wait = f"before {here.where}"
    if there.thread != here.thread:
        record = f"thread {there.thread}, {record}"
        wait = f"thread {here.thread}, {wait}, once it has been handed e"
    return missing, _code((f"e = {first.stream}.record_event()", record), (f"{second.stream}.wait_event(e)", wait))


def _lag(waiter: str, first: Access, covered: int) -> str:
    if covered == 0:
        return f"{waiter} has waited for no work of stream `{first.stream}`"
    return (
        f"{waiter} has waited for stream `{first.stream}` only up to its item {covered}; the {first.mode} at "
        f"{first.site.where} is item {first.item}"
    )


def _reused_block(first: Access, second: Access, before: Allocation) -> Advice | None:
    """The block went to a new owner while the old one's work could still be pending."""
    assert before.freed is not None
    if first.on_host or first.stream == before.stream:
        return None  # the allocator does order these; the second access simply runs elsewhere
    old = first.buffer
    missing = (
        f"`{old}` was freed at {before.freed.where} and its block handed out again; the allocator does not know that "
        f"stream `{first.stream}` was still to {first.mode} it"
    )
    return missing, _code((f"{old}.record_stream({first.stream})", f"before the free at {before.freed.where}"))


def _threads(first: Access, second: Access) -> Advice:
    here, there = second.site, first.site
    lock = first.lock or second.lock or "lock"
    missing = f"no lock, signal or join orders thread `{here.thread}` at {here.where} after thread `{there.thread}`"
    if first.lock != second.lock:
        held = first if first.lock else second
        missing += f" (only thread `{held.site.thread}` holds lock `{held.lock}` there)"
    return missing, _code(
        (f"with {lock}:", f"thread {there.thread}, around {there.where} and what must stay with it"),
        (f"with {lock}:", f"thread {here.thread}, around {here.where} and what must stay with it"),
    )


def capture(first: Access, second: Access) -> Advice:
    """A forbidden call of another thread, unordered with a global-mode capture."""
    begin, call = (first, second) if first.do == "begin_capture" else (second, first)
    missing = (
        f"the capture that thread `{begin.site.thread}` began at {begin.site.where} is global: until its end_capture "
        f"the call of thread `{call.site.thread}` at {call.site.where} fails or breaks it, and nothing orders the two"
    )
    return missing, _code(
        ('torch.cuda.graph(g, capture_error_mode="thread_local")', f"the capture at {begin.site.where}"),
        ("with capture_lock:", "or, in both threads: around the whole capture, and around the call"),
    )


def stale(
    kind: str, buffer: str | None, use: Access, released: Site, allocated: Allocation | None, owner: str | None
) -> Advice:
    """An ordered use of something already released."""
    taken = f", and its bytes belong to `{owner}` now" if owner else ""
    if kind == "use-after-free":
        missing = f"`{buffer}` was freed at {released.where}, before {use.site.where} used it{taken}"
        rows = [(f"del {buffer}", f"move the free from {released.where} to after {use.site.where}")]
        if use.stream is not None and (allocated is None or use.stream != allocated.stream):
            rows.insert(0, (f"{buffer}.record_stream({use.stream})", "before that free: it runs on another stream"))
        return missing, _code(*rows)
    if kind == "replay-after-free":
        missing = (
            f"graph `{use.graph}` has the address of `{buffer}` baked in, which was freed at {released.where}{taken}"
        )
        comment = f"let the graph own it: free it only after the replay at {use.site.where}"
        return missing, _code((f"{use.graph}.keep = [{buffer}]", comment))
    if kind == "record-after-free":
        missing = f"`{buffer}` was freed at {released.where}; the allocator can no longer be told to wait for a stream"
        return missing, _code((f"{buffer}.record_stream({use.stream})", f"move it before the free at {released.where}"))
    if kind == "double-free":
        missing = f"`{buffer}` was already freed at {released.where}{taken}"
        return missing, _code((f"del {buffer}", f"only once: drop the one at {use.site.where}"))
    if kind == "dead-stream-free":
        missing = (
            f"`{buffer}` is tied to stream `{use.stream}` by record_stream, and that stream was destroyed at "
            f"{released.where}: its free would record an event there"
        )
        return missing, _code((f"del {buffer}", f"before stream {use.stream} is destroyed at {released.where}"))
    if kind == "double-destroy":
        missing = f"stream `{use.stream}` was already destroyed at {released.where}"
        return missing, _code((f"del {use.stream}", f"only once: drop the one at {use.site.where}"))
    missing = f"stream `{use.stream}` was destroyed at {released.where}, before the {use.do} at {use.site.where}"
    return missing, _code((f"del {use.stream}", f"move it from {released.where} to after {use.site.where}"))

"""What threads share: declared in one place, plain in production, and nothing of the runtime's goes round it."""

from __future__ import annotations

import ast
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import anabranch
from anabranch import _sync
from anabranch.devices import get_device
from anabranch.runtime._pool import ContextPool, Limits
from anabranch.runtime._process import process

PACKAGE = Path(anabranch.__file__).parent


def test_in_production_everything_is_the_plain_object(run_python: Any) -> None:
    done = run_python(
        """
        import threading
        from collections import deque
        from anabranch import _sync
        from anabranch.runtime import Engine
        from anabranch.runtime._process import process
        assert type(_sync.lock("a")) is type(threading.Lock())
        assert type(_sync.rlock("a")) is type(process.build_lock) is type(threading.RLock())
        assert type(_sync.event("a")) is threading.Event
        for made, plain in ((_sync.dict_, dict), (_sync.deque_, deque), (_sync.list_, list), (_sync.set_, set)):
            assert type(made("a")) is plain
        for owner, names in _sync._atomics:
            for name in names:
                assert not hasattr(owner, name), (owner, name)
        print(sorted(owner.__name__ for owner, _ in _sync._atomics))
        """
    )
    assert done.returncode == 0, done.stderr
    assert {"Engine", "ContextPool", "_Process"} <= set(ast.literal_eval(done.stdout))


class Told(_sync.Factories):
    """Remembers what was made."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.declared: dict[str, tuple[str, ...]] = {}

    def lock(self, name: str) -> Any:
        self.made.append(name)
        return super().lock(name)

    def atomics(self, owner: type, names: tuple[str, ...]) -> None:
        self.declared[owner.__name__] = names


@pytest.fixture
def told() -> Any:
    before = _sync._factories
    told = Told()
    _sync.install(told)
    yield told
    _sync.install(before)


def test_installed_factories_make_what_is_made_from_then_on_and_hear_of_every_declaration(told: Told) -> None:
    ContextPool(Limits(1, None))
    assert told.made == ["limits", "pool"]
    assert told.declared["ContextPool"] == ("may_grow",)

    @_sync.atomics("later")
    class Later:
        pass

    try:
        assert told.declared["Later"] == ("later",)
    finally:
        _sync._atomics.remove((Later, ("later",)))


def _calls(path: Path) -> list[str]:
    """Each ``module.name(...)`` that the file calls, and each bare ``name(...)``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            found.append(ast.unparse(node.func))
    return found


@pytest.mark.parametrize("folder", ["runtime", "devices"])
def test_no_lock_of_the_runtime_is_made_elsewhere(folder: str) -> None:
    primitives = {"Lock", "RLock", "Event", "Condition", "Semaphore", "BoundedSemaphore", "Barrier", "local"}
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        for call in _calls(path):
            module, _, name = call.rpartition(".")
            if module in ("", "threading"):
                assert name not in primitives, f"{path.name} calls {call}: make it with anabranch._sync"


#: Immutable once made, changed only with a lock held or by one thread; or of the interpreter's own.
_PLAIN_STATE = {
    ("ContextPool", "_idle"): "its lock",
    ("ContextPool", "_waiters"): "its lock",
    ("ContextPool", "_alive"): "its lock",
    ("Pool", "_alive"): "the build lock; read while no thread builds",
    ("OwnCode", "_classes"): "filled while an engine is built, with the build lock held",
    ("_DynamoSettings", "_used"): "made whole under its lock, then read",
    ("_Wide", "alone"): "one thread, which compares",
    ("_Process", "_watched"): "filled when the native runtime is imported, read at the interpreter's exit",
    ("_Process", "_forked"): "read in a forked child only, where there is one thread",
    ("_Flattening", "_several"): "one thread, which makes the list",
    ("_Following", "_computed"): "one thread, which follows the wrapper",
    ("_Places", "_starts"): "filled while it is made, by the thread that builds",
    ("_Places", "_stops"): "filled while it is made, by the thread that builds",
    ("Padding", "_proved"): "filled by compile, before anybody has the engine",
    ("Specialization", "_proofs"): "the build lock",
    ("Turns", "_waits"): "its lock; a thread looks for itself without",
    ("Turns", "_captures"): "its lock; a thread looks for itself without",
    ("StaticOutputs", "_plain"): "its context's owner",
    ("StaticOutputs", "_shared"): "its context's owner",
    ("Tally", "_counts"): "its lock",
    ("_Memory", "tensors"): "its session's lock",
    ("_Words", "_tensors"): "its lock",
}


def test_every_container_that_an_object_of_the_runtime_changes_is_declared_or_accounted_for() -> None:
    """Empty containers that a constructor makes are there to be filled: by whom, and under what lock?"""
    undeclared = []
    for folder in ("runtime", "devices"):
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            for owner in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)):
                made = next((f for f in owner.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
                for node in ast.walk(made) if made else ():
                    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                        continue
                    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                    value = ast.unparse(node.value)
                    empty = value in ("{}", "[]", "set()", "deque()") or "weakref.Weak" in value
                    if isinstance(target, ast.Attribute) and empty:
                        undeclared.append((owner.name, target.attr))
    assert set(undeclared) <= set(_PLAIN_STATE), sorted(set(undeclared) - set(_PLAIN_STATE))


def test_a_tally_counts_exactly_in_many_threads() -> None:
    tally = _sync.Tally(["a", "b"])

    def work() -> None:
        for _ in range(5000):
            tally.add("a", "b")
            tally.add("a")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert tally.read() == {"a": 40_000, "b": 20_000}


# -- forks ------------------------------------------------------------------------------------------------------------


def in_child(work: Any) -> int:
    """Exit status of a forked child that runs ``work``: 0 where it returned something true."""
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_devices_say_what_a_forked_child_has() -> None:
    assert get_device("cpu").survives_fork
    source = (PACKAGE / "devices" / "cuda" / "_device.py").read_text()
    assert "survives_fork = False" in source
    source = (PACKAGE / "sim" / "_device.py").read_text()
    assert "survives_fork = True" in source


def test_an_engine_whose_device_does_not_survive_a_fork_is_refused_in_the_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = anabranch.compile(torch.nn.ReLU(), [torch.randn(4)], backend="eager")
    x = torch.randn(4)
    monkeypatch.setattr(type(get_device("cpu")), "survives_fork", False)

    def refused() -> bool:
        for use in (lambda: engine(x), engine.warm, engine.trim):
            with pytest.raises(anabranch.EngineClosed, match="spawn"):
                use()
        return True

    assert in_child(refused) == 0
    assert torch.equal(engine(x), x.relu()), "the parent goes on"


def test_what_is_registered_hears_of_a_fork_in_order_and_only_while_it_lives() -> None:
    heard: list[int] = []

    class Owner:
        def __init__(self, i: int) -> None:
            self.i = i

        def after_fork(self) -> None:
            heard.append(self.i)

    owners = [Owner(i) for i in range(20)]
    for owner in owners:
        process.register(owner)
    del owners[3], owner
    gc.collect()
    assert in_child(lambda: heard == [i for i in range(20) if i != 3]) == 0
    assert heard == []


def test_nobody_waits_in_a_child_for_a_context_that_another_thread_had() -> None:
    pool: Any = ContextPool(Limits(1, None))
    context = type("Context", (), {"nbytes": 1, "used_on": None})()
    pool._limits.reserve(1)
    pool.add(context)
    pool.release(context)
    assert pool.acquire(7, lambda: True) is context
    with pool._lock:
        assert in_child(lambda: len(pool) == 0 and pool.acquire(8, lambda: True) is None) == 0
    pool.release(context)
    assert pool.acquire(8, lambda: True) is context


def test_renewing_the_locks_makes_new_ones() -> None:
    before = process.build_lock
    process.renew_locks()
    assert process.build_lock is not before
    with process.build_lock, process.build_lock:
        pass

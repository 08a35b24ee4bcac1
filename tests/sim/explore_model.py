"""A program as plain data, run by an interpreter: the search without processes, for thousands of random programs.

A thread is a list of instructions; values are counted in ``write`` so that every order of writes shows. A queue holds
ops that threads push. The outcome of a run is what every read, try and timed wait gave, and the final values.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from anabranch.explore._dependence import (
    ACQUIRE,
    ADD,
    AWAIT,
    GIVE,
    HOST_ASYNC,
    NEED,
    READ,
    RELEASE,
    WRITE,
    History,
    Step,
    Touch,
    dependent,
)
from anabranch.explore._run import Run

Instruction = tuple[str, Any]


@dataclass
class _State:
    counters: dict[str, int] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    locks: dict[str, str | None] = field(default_factory=dict)
    queues: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    seen: dict[str, list[Any]] = field(default_factory=dict)


class Model:
    def __init__(self, threads: dict[str, list[Instruction]]) -> None:
        self.threads = threads

    def run(self, prefix: Sequence[str], sleep: dict[str, Step]) -> Run:
        state = _State()
        steps: list[Step] = []
        enabled: list[frozenset[str]] = []
        asleep: dict[str, Step] = {}
        while True:
            pending = {a: s for a in [*self.threads, *state.queues] if (s := self._pending(state, a)) is not None}
            able = [a for a in pending if self._able(state, a, pending[a])]
            if not able:
                end = "deadlock" if pending else "complete"
                break
            if len(steps) < len(prefix):
                actor = prefix[len(steps)]
                assert actor in able
                if len(steps) == len(prefix) - 1:
                    asleep = dict(sleep)
            else:
                awake = [a for a in able if a not in asleep]
                if not awake:
                    end = "cut"
                    pending = {a: s for a, s in pending.items() if a not in able}
                    break
                actor = steps[-1].actor if steps and steps[-1].actor in awake else awake[0]
            step = pending[actor]
            steps.append(step)
            enabled.append(frozenset(able))
            asleep = {a: s for a, s in asleep.items() if not dependent(s, step)}
            self._execute(state, actor)
        outcome = repr((sorted(state.seen.items()), sorted(state.values.items(), key=str), end == "deadlock"))
        return Run(steps, enabled, end, list(pending.values()), outcome=outcome)  # type: ignore[arg-type]

    def _instruction(self, state: _State, actor: str) -> Instruction | None:
        if actor in self.threads:
            at = state.counters.get(actor, 0)
            code = self.threads[actor]
            # `unless x skips the next instruction if x was ever written: control flow that depends on values.
            return code[at] if at < len(code) else None
        queue = state.queues[actor]
        return queue[0] if queue else None

    def _pending(self, state: _State, actor: str) -> Step | None:
        instruction = self._instruction(state, actor)
        if instruction is None:
            return None
        do, on = instruction
        touches: list[Touch] = []
        if do in ("write", "add", "read", "unless"):
            mode = {"write": WRITE, "add": ADD, "read": READ, "unless": READ}[do]
            touches = [(f"v{on}", 0, 1, mode)]
        elif do == "acquire":
            touches = [(f"lock:{on}", 0, 1, ACQUIRE)]
        elif do == "release":
            touches = [(f"lock:{on}", 0, 1, RELEASE), (f"try:{on}", 0, 1, WRITE)]
        elif do == "try":
            touches = [(f"lock:{on}", 0, 1, ACQUIRE), (f"try:{on}", 0, 1, WRITE)]
        elif do in ("set", "clear"):
            touches = [(f"e{on}", 0, 1, WRITE)]
        elif do == "wait":
            touches = [(f"e{on}", 0, 1, AWAIT)]
        elif do == "put":
            touches = [(f"line{on}", 0, 1, WRITE)]
        elif do == "get":
            touches = [(f"line{on}", 0, 1, AWAIT), (f"got{on}", 0, 1, WRITE)]
        elif do == "push":
            queue, op, memory, host = on
            touches = [(f"q{queue}", 0, 1, WRITE), (f"u{op}", 0, 1, GIVE)]
        elif do == "sync":
            touches = [(f"x{on}", 0, 1, NEED)]
        elif do == "query":
            touches = [(f"y{on}", 0, 1, READ)]
        elif do == "op":
            op, memory, host = on
            touches = [(f"u{op}", 0, 1, NEED), (f"x{op}", 0, 1, GIVE), (f"y{op}", 0, 1, WRITE)]
            touches.append((f"m{memory}", 0, 1, WRITE))
            if host:
                touches.append(("host", 0, 1, HOST_ASYNC))
        return Step(actor, f"{do} {on}", touches)

    def _able(self, state: _State, actor: str, step: Step) -> bool:
        do, on = self._instruction(state, actor) or ("", "")
        if do == "acquire":
            return state.locks.get(on) is None
        if do == "wait":
            return bool(state.values.get(f"flag{on}"))
        if do == "sync":
            return on in state.done
        if do == "get":
            return bool(state.values.get(f"line{on}"))
        return True

    def _execute(self, state: _State, actor: str) -> None:
        do, on = self._instruction(state, actor) or ("", "")
        seen = state.seen.setdefault(actor, [])
        if actor in self.threads:
            state.counters[actor] = state.counters.get(actor, 0) + 1
        if do == "write":
            state.values[on] = (actor, state.counters[actor])
        elif do == "add":
            state.values[on, "sum"] = state.values.get((on, "sum"), 0) + 1
        elif do == "read":
            seen.append((state.values.get(on), state.values.get((on, "sum"))))
        elif do == "unless":
            if state.values.get(on) is not None or state.values.get((on, "sum")):
                state.counters[actor] += 1
        elif do in ("acquire", "try"):
            if state.locks.get(on) is None:
                state.locks[on] = actor
                seen.append(True)
            else:
                seen.append(False)
                state.counters[actor] += 1  # what follows a try is the release
        elif do == "release":
            if state.locks.get(on) == actor:
                state.locks[on] = None
        elif do in ("set", "clear"):
            state.values[f"flag{on}"] = do == "set"
        elif do == "push":
            queue, op, memory, host = on
            state.queues.setdefault(queue, []).append(("op", (op, memory, host)))
        elif do == "put":
            state.values[f"line{on}"] = [*state.values.get(f"line{on}", []), (actor, state.counters[actor])]
        elif do == "get":
            first, *rest = state.values[f"line{on}"]
            state.values[f"line{on}"] = rest
            seen.append(first)
        elif do == "query":
            seen.append(on in state.done)
        elif do == "op":
            state.queues[actor].pop(0)
            op, memory, host = on
            state.done.add(op)
            state.values[f"m{memory}"] = op
            if host:
                state.values["host", op] = sorted(state.counters.items())


def trace_of(run: Run) -> frozenset[object]:
    """The Mazurkiewicz trace: equal for schedules that differ only in the order of neighbours that commute."""
    history = History()
    number: list[int] = []
    count: dict[str, int] = {}
    for step, enabled in zip(run.steps, run.enabled, strict=True):
        count[step.actor] = count.get(step.actor, 0) + 1
        number.append(count[step.actor])
        history.add(step, enabled, history.relate(step))
    return frozenset(
        (step.actor, number[i], step.label, frozenset((actor, number[k]) for actor, k in history.clocks[i].items()))
        for i, step in enumerate(history.steps)
    )


def random_model(seed: int) -> Model:
    """2 to 3 threads of up to 5 instructions; at most about a thousand schedules."""
    rng = random.Random(seed)
    threads: dict[str, list[Instruction]] = {}
    ops = [0]
    flavour = rng.choice(["memory", "locks", "events", "device", "lines", "all"])
    kinds = {
        "memory": ["write", "write", "read", "add", "unless"],
        "locks": ["lock", "lock", "try", "write", "read"],
        "events": ["set", "wait", "clear", "write", "unless"],
        "lines": ["put", "get", "put", "get", "write", "read"],
        "device": ["push", "push", "sync", "query", "write"],
        "all": [
            "write",
            "read",
            "lock",
            "try",
            "set",
            "wait",
            "clear",
            "push",
            "sync",
            "unless",
            "query",
            "put",
            "get",
        ],
    }[flavour]
    for t in range(rng.choice([2, 2, 3])):
        code: list[Instruction] = []
        length = rng.randint(1, 4 if t < 2 else 3 if flavour in ("lines", "events") else 2)
        while len(code) < length:
            do = rng.choice(kinds)
            on = rng.choice("ab")
            if do == "lock":
                inner = [(rng.choice(["write", "read"]), rng.choice("ab"))] if rng.random() < 0.5 else []
                if rng.random() < 0.3:
                    other = "b" if on == "a" else "a"
                    inner = [("acquire", other), *inner, ("release", other)]
                code += [("acquire", on), *inner, ("release", on)]
            elif do == "try":
                code += [("try", on), ("release", on)]
            elif do == "push":
                ops[0] += 1
                code.append(("push", (f"s{rng.randint(1, 2)}", f"{t}.{ops[0]}", rng.choice("ab"), rng.random() < 0.3)))
            elif do in ("sync", "query"):
                mine = [i[1][1] for i in code if i[0] == "push"]
                if mine:
                    code.append((do, rng.choice(mine)))
                else:
                    length -= 1
            else:
                code.append((do, on))
        threads[f"T{t}"] = code
    return Model(threads)

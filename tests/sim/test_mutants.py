"""Each broken runtime is found, by each oracle alone, and by its own diagnostic; its repaired twin is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = "mutants"

#: What the race checker says of each. Streams by what they are: the callers' A, B and C, and the runtime's own lane.
DIAGNOSTICS = {
    "stale stream": "stream `legacy` has waited for no work of stream `A`",
    "no input wait": "stream `lane` has waited for no work of stream `A`",
    "no output wait": "stream `A` has waited for no work of stream `lane`",
    "one context shared by two streams": "stream `B` has waited for no work of stream `A`",
    "released before the outputs are copied out": "has waited for stream `A` only up to its item",
    "inputs refilled while the graph runs": "stream `B` has waited for no work of stream `A`",
    "context freed early": "its block handed out again",
    "event re-used too soon": "stream `C` has waited for no work of stream `A`",
    "record_stream forgotten": "record_stream",
    "error path that does not drain": "stream `B` has waited for no work of stream `A`",
    "two preemptions": "has waited for no work of stream",
    "one instance shared by two contexts": "stream `B` has waited for no work of stream `A`",
    "instance that does not wait for its last run": "stream `B` has waited for no work of stream `A`",
    "instance released before its run is queued": "has waited for no work of stream",
    "instance of a direct call captured": "stream `B` has waited for no work of stream `A`",
    "order between two pieces skipped": "stream `lane` has waited for no work of stream `A`",
    "value between pieces left in the context": "stream `B` has waited for",
    "state shared by two sessions": "stream `B` has waited for no work of stream `A`",
    "graph that keeps the first session's tensors": "stream `B` has waited for no work of stream `A`",
    "state copied back after the record": "stream `B` has waited for stream `A` only up to its item",
    "session's call that does not wait for the last": "stream `B` has waited for no work of stream `A`",
    "reset that does not wait for the session's calls": "stream `A` has waited for no work of stream `B`",
    "session that two threads call at once": "has waited for no work of stream",
    "session freed while its call is queued": "its block handed out again",
}


def named(mutants: Any, report: str) -> str:
    """The report with streams under the names of ``DIAGNOSTICS``: their own depend on what was made before."""
    names = {f"s{stream.stream_id}": name for stream, name in zip(mutants.STREAMS, "ABC", strict=True)}
    names[f"s{mutants.LANE.stream_id}"] = "lane"
    return re.sub(r"`(s\d+)`", lambda m: f"`{names.get(m[1], m[1])}`", report)


@pytest.fixture(scope="module")
def mutants(programs: Any) -> Any:
    assert set(programs.MUTANTS) == set(DIAGNOSTICS)
    return programs


@pytest.mark.parametrize("name", DIAGNOSTICS)
@pytest.mark.parametrize("oracle", ["race", "values"])
def test_found_by_exhaustive_search(mutants: Any, name: str, oracle: str) -> None:
    from anabranch.sim import explore

    broken, _ = mutants.MUTANTS[name]
    verdict = explore(broken, oracles=[oracle])
    assert verdict.failed, f"{name}: {verdict}"
    assert verdict.oracles == {oracle}
    if oracle == "race":
        assert DIAGNOSTICS[name] in named(mutants, verdict.report()), verdict.report()
    else:
        assert "expected" in verdict.failures[0].message


@pytest.mark.parametrize("name", DIAGNOSTICS)
@pytest.mark.parametrize("oracle", ["race", "values"])
def test_found_by_random_schedules(mutants: Any, name: str, oracle: str) -> None:
    from anabranch.sim import explore, random

    broken, _ = mutants.MUTANTS[name]
    verdict = explore(broken, scheduler=random(0), schedules=50, oracles=[oracle])
    assert verdict.failed, f"{name}: {verdict}"


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_its_repaired_twin_passes_the_exhaustive_search(mutants: Any, name: str) -> None:
    from anabranch.sim import explore

    _, repaired = mutants.MUTANTS[name]
    verdict = explore(repaired)
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_the_replay_fails_the_same_way(mutants: Any, name: str) -> None:
    from anabranch.sim import explore, replay

    broken, _ = mutants.MUTANTS[name]
    verdict = explore(broken, oracles=["values"])
    again = explore(broken, oracles=["values"], scheduler=replay(verdict.schedule))
    assert (str(again), again.failures) == (str(verdict), verdict.failures)


_FIND = """
import json, sys
sys.path.insert(0, "tests/sim/programs")
from mutants import MUTANTS
from anabranch.sim import explore

found = {name: explore(MUTANTS[name][0], oracles=["values"]) for name in sys.argv[1:]}
print(json.dumps({name: (v.command, v.failures[0].message, str(v)) for name, v in found.items()}))
"""


def fresh_process(command: list[str] | str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, shell=isinstance(command, str)
    )


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, tuple[str, str, str]]:
    """Command, message and verdict of each mutant that is asked for; in a fresh process, because streams are named in
    order."""
    test = test_the_replay_command_fails_the_same_way_in_a_fresh_process
    asked = [item.callspec.params["name"] for item in request.session.items if getattr(item, "obj", None) is test]  # type: ignore[attr-defined]
    done = fresh_process([sys.executable, "-c", _FIND, *asked])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


#: What a push replays in a fresh process. To replay is the same for all; that each kind is found is another test.
REPLAYED = ("record_stream forgotten",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in REPLAYED else pytest.mark.slow) for name in DIAGNOSTICS]
)
def test_the_replay_command_fails_the_same_way_in_a_fresh_process(
    found: dict[str, tuple[str, str, str]], name: str
) -> None:
    command, message, verdict = found[name]
    again = fresh_process(command)
    assert again.returncode == 1, again.stdout + again.stderr
    # The same wrong values of the same call, and the same schedule.
    assert message.split(" (thread")[0] in again.stdout, again.stdout + again.stderr
    assert verdict in again.stdout

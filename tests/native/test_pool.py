"""The native runtime's pool under sanitizers: ``pool_driver.cpp``, a device in plain C++, without PyTorch or Python.

The driver says what it does and why its device hides no race. Here it is built: as the sources are, for ThreadSanitizer
and for AddressSanitizer with UndefinedBehaviorSanitizer; and with defects planted, one of which each run has. A defect
that is not found fails the test, and so does a defect that can no longer be planted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from anabranch._toolchain import build

CORE = Path(__file__).parents[2] / "src/anabranch/runtime/_core"
DRIVER = Path(__file__).parent / "pool_driver.cpp"
SOURCES = ("pool.cpp", "sync.cpp")
THREAD = ["-fsanitize=thread"]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]

#: Exit statuses: what the driver itself finds, and what ThreadSanitizer does.
CHECK, HANG, RACE = 1, 3, 66


def program(name: str, core: Path, flags: list[str]) -> Path:
    sources = [*(core / source for source in SOURCES), DRIVER]
    return build(name, sources, flags=["-std=c++20", f"-I{core}", *flags], libraries=["-lpthread"], shared=False)


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}",
        "ASAN_OPTIONS": "detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }

    def once(*prefix: str) -> subprocess.CompletedProcess[str]:
        command = [*prefix, str(driver), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = once()
    if "unexpected memory mapping" in done.stderr:
        # Kernels that spread addresses further than this compiler's ThreadSanitizer expects.
        done = once("setarch", "-R")
    return done


def run_clean(driver: Path, *arguments: str) -> dict[str, Any]:
    """What the driver counted, after a run in which nobody found anything."""
    done = run(driver, *arguments)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr == ""
    counts: dict[str, Any] = json.loads(done.stdout)
    return counts


@pytest.fixture(scope="session")
def tsan() -> Path:
    return program("pool-driver-thread", CORE, THREAD)


@pytest.fixture(scope="session")
def asan() -> Path:
    return program("pool-driver-address", CORE, ADDRESS)


@pytest.fixture(scope="session")
def plain() -> Path:
    return program("pool-driver-plain", CORE, [])


@pytest.fixture(params=["thread", "address"])
def driver(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue({"thread": "tsan", "address": "asan"}[request.param])


# -- the code as it is ------------------------------------------------------------------------------------------------

#: More threads than streams, so that hosts share streams; `contexts=0` is no limit, `contexts=-1` a pool without any.
CALLS = {
    "one context": "threads=12 streams=5 contexts=1 calls=100 trust=1",
    "many threads, one context": "threads=64 streams=5 contexts=1 calls=20",
    "two contexts": "threads=12 streams=5 contexts=2 calls=100 trust=1",
    "half as many contexts as threads": "threads=12 streams=5 contexts=6 calls=100 trust=1",
    "contexts without a limit": "threads=12 streams=5 contexts=0 calls=100 trust=1",
    "a pool without limits": "threads=12 streams=5 contexts=-1 calls=100 change=1 trust=1",
    "threads that change streams": "threads=12 streams=5 contexts=3 calls=100 change=1 trust=1",
    "waiting always, as the runtime does": "threads=12 streams=5 contexts=3 calls=100 change=1",
    "errors": "threads=12 streams=5 contexts=3 calls=100 change=1 errors=8 visit=1",
    "errors of the only context": "threads=12 streams=5 contexts=1 calls=100 errors=4",
    "errors in a pool without limits": "threads=12 streams=5 contexts=-1 calls=100 change=1 errors=8 visit=1",
    "trimmed meanwhile": "threads=12 streams=5 contexts=3 calls=100 change=1 trim=1 visit=1",
    "the only context trimmed meanwhile": "threads=12 streams=5 contexts=1 calls=100 trim=1",
    "a memory limit": "threads=12 streams=5 contexts=0 calls=100 change=1 memory=350",
    "everything at once": "threads=12 streams=5 contexts=4 calls=200 change=1 memory=350 errors=16 trim=1 visit=1",
}


@pytest.mark.parametrize("jitter", ["jitter=0", "jitter=6"])
@pytest.mark.parametrize("name", CALLS)
def test_calls(driver: Path, name: str, jitter: str) -> None:
    words = CALLS[name].split()
    counts = run_clean(driver, "calls", *words, jitter)
    asked = {key: int(value) for key, value in (word.split("=") for word in words)}
    assert counts["calls"] == asked["threads"] * asked["calls"]
    if asked["contexts"] == -1:
        assert counts["waits"] == 0
    if "errors" in asked:
        assert counts["failed"] > 0


def test_which_context_a_call_gets(driver: Path) -> None:
    run_clean(driver, "choice")


@pytest.mark.parametrize("change", ["change=0", "change=1"])
def test_nobody_is_overtaken_twice(driver: Path, change: str) -> None:
    counts = run_clean(driver, "fair", "threads=64", "calls=60", "jitter=6", change)
    assert counts["stood_in_line"] > 100
    assert counts["most_served_meanwhile"] <= counts["bound"] == 63


def test_nobody_is_left_in_line(driver: Path) -> None:
    run_clean(driver, "line")


def test_hints_of_pools_that_are_gone(driver: Path) -> None:
    counts = run_clean(driver, "hints", "threads=6", "streams=3", "contexts=3", "calls=8")
    assert counts["calls"] == 6 * 2 * 20 * 8


def test_a_refused_reservation_is_in_nobody_s_way(driver: Path) -> None:
    run_clean(driver, "reserve", "calls=20000")


def test_fork_in_the_middle_of_calls(plain: Path) -> None:
    # The sanitizers' allocators have locks of their own, which a child may find held for good.
    counts = run_clean(plain, "forks", "threads=4", "contexts=6", "calls=40")
    assert counts["idle"] >= 40 * 2 - 40  # six contexts, four threads: in general two are idle


# -- defects ----------------------------------------------------------------------------------------------------------


def found(driver: Path, status: int, text: str, scenario: str, *more: str) -> None:
    """Some run of a few finds it: which thread goes first is the machine's business."""
    ends = []
    for seed in range(1, 11):
        done = run(driver, *scenario.split(), f"seed={seed}", *more)
        ends.append((done.returncode, done.stderr[-400:]))
        if done.returncode == status and re.search(text, done.stderr):
            return
    pytest.fail(f"not found: {ends}")


#: The runtime's part, as the driver plays it: shows that the device lets a sanitizer see what is not ordered.
MISUSES = {
    "no wait on the device": "calls no_wait=1 contexts=1",
    "given back before its use is recorded": "calls early_release=1 contexts=1",
    "destroyed while the device uses it": "calls early_free=1 errors=4",
}


@pytest.mark.parametrize("name", MISUSES)
def test_a_misuse_is_reported(tsan: Path, name: str) -> None:
    found(tsan, RACE, "ThreadSanitizer: data race", MISUSES[name])


def test_freed_memory_is_reported(asan: Path) -> None:
    found(asan, CHECK, "AddressSanitizer: heap-use-after-free", "calls early_free=1 errors=4")


def test_an_unchecked_hint_is_reported(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one defect of `planted.h` that this driver can reach.
    monkeypatch.setenv("ANABRANCH_PLANTED", "unchecked hint")
    found(planted, RACE, "ThreadSanitizer: data race", "calls threads=12 contexts=2 jitter=6")


class Defect(NamedTuple):
    file: str
    #: Text that occurs once, and what stands there while the defect is on (the condition is ``ON``).
    changes: list[tuple[str, str]]
    scenario: str
    status: int
    text: str


HUNG = "hang: nothing moved"
DATA_RACE = "ThreadSanitizer: data race"

DEFECTS = {
    "idle, and last used where it was used before": Defect(
        "pool.cpp",
        [
            (
                "Slot::word(Slot::kIdle, stream))) return;",
                "Slot::word(Slot::kIdle, ON ? Slot::stream(before) : stream))) return;",
            )
        ],
        "calls threads=12 streams=2 contexts=2 change=1 trust=1 calls=300",
        RACE,
        DATA_RACE,
    ),
    "nobody marks what is wanted": Defect(
        "pool.cpp",
        [("|| change(slot, word, Slot::kWanted)", "|| ON || change(slot, word, Slot::kWanted)")],
        "line",
        CHECK,
        "drained from those who wait",
    ),
    "wanted, and not found idle a moment later": Defect(
        "pool.cpp",
        [
            (
                "if (change(slot, word, Slot::kTaken)) return taken(&slot, stream);",
                "if (ON) break;\n            if (change(slot, word, Slot::kTaken)) return taken(&slot, stream);",
            )
        ],
        "line",
        HANG,
        HUNG,
    ),
    "given back without a look at the line": Defect(
        "pool.cpp",
        [
            (
                "  auto taken = Slot::word(Slot::kTaken, Slot::stream(before));\n",
                '  if (ON) return slot->word_.store("give back", Slot::word(Slot::kIdle, stream));\n'
                "  auto taken = Slot::word(Slot::kTaken, Slot::stream(before));\n",
            )
        ],
        "calls contexts=1 jitter=2 calls=300",
        HANG,
        HUNG,
    ),
    "handed over as if nobody else waited": Defect(
        "pool.cpp",
        [
            (
                "Slot::word(line_.empty() ? Slot::kTaken : Slot::kWanted, stream)",
                "Slot::word(ON || line_.empty() ? Slot::kTaken : Slot::kWanted, stream)",
            )
        ],
        "line",
        HANG,
        HUNG,
    ),
    "added as if nobody waited": Defect(
        "pool.cpp",
        [
            (
                "Slot::word(line_.empty() ? Slot::kTaken : Slot::kWanted, Slot::kNever)",
                "Slot::word(ON || line_.empty() ? Slot::kTaken : Slot::kWanted, Slot::kNever)",
            )
        ],
        "line",
        HANG,
        HUNG,
    ),
    "nobody sent away at the last context's error": Defect(
        "pool.cpp",
        [("if (!--alive_) send_away();", "if (!--alive_ && !ON) send_away();")],
        "line",
        HANG,
        HUNG,
    ),
    "the line served from its end": Defect(
        "pool.cpp",
        [
            (
                "auto* waiter = line_.front();\n  line_.pop_front();",
                "auto* waiter = ON ? line_.back() : line_.front();\n  ON ? line_.pop_back() : line_.pop_front();",
            )
        ],
        "fair threads=64 calls=60 jitter=6",
        CHECK,
        "other calls were served while one stood in line",
    ),
    "a pool known by its address": Defect(
        "pool.cpp",
        [
            (
                "serial_(next_serial.fetch_add(1))",
                "serial_(ON ? reinterpret_cast<uint64_t>(this) : next_serial.fetch_add(1))",
            )
        ],
        "hints threads=6 streams=3 contexts=3 calls=8",
        RACE,
        "ThreadSanitizer: (heap-use-after-free|data race)",
    ),
    "discarded without the lock": Defect(
        "pool.cpp",
        [
            (
                "  std::lock_guard<Mutex> guard(lock_);\n  auto payload = std::move(slot->payload);",
                "  std::unique_ptr<Payload> early = ON ? std::move(slot->payload) : nullptr;\n"
                "  std::lock_guard<Mutex> guard(lock_);\n"
                "  auto payload = ON ? std::move(early) : std::move(slot->payload);",
            )
        ],
        "calls errors=4 visit=1 calls=300",
        RACE,
        DATA_RACE,
    ),
    "a context for any stream in a pool without limits": Defect(
        "pool.cpp",
        [
            (
                "      if (!limits_) return {.kind = Acquired::kRoom};",
                "      if (!limits_ && !(ON && oldest)) return {.kind = Acquired::kRoom};\n"
                "      can_build = can_build && limits_;",
            )
        ],
        "calls contexts=-1 change=1",
        CHECK,
        "lent across streams",
    ),
    "a reservation in two steps": Defect(
        "pool.cpp",
        [
            (
                'if (held_.change("reserve", held, held + kOne + bytes)) return true;',
                'if (ON) return held_.store("reserve", held + kOne + bytes), true;\n'
                '    if (held_.change("reserve", held, held + kOne + bytes)) return true;',
            )
        ],
        "calls threads=12 contexts=3 errors=4 jitter=2 calls=300",
        CHECK,
        "contexts|limits",
    ),
    "an exchange that orders nothing": Defect(
        "sync.h",
        [
            (
                "    return value_.compare_exchange_strong(from, to);",
                "    if (ON) return value_.compare_exchange_strong(from, to, std::memory_order_relaxed);\n"
                "    return value_.compare_exchange_strong(from, to);",
            )
        ],
        "calls threads=12 contexts=2",
        RACE,
        DATA_RACE,
    ),
    "waking who may be gone": Defect(
        "sync.h",
        [
            (
                "    is_set_ = true;\n    changed_.notify_all();\n",
                "    is_set_ = true;\n"
                "    if (ON) mutex_.unlock(), sched_yield();\n"
                "    changed_.notify_all();\n"
                "    if (ON) mutex_.lock();\n",
            )
        ],
        "calls threads=12 contexts=1 calls=1000",
        RACE,
        "ThreadSanitizer: (heap-use-after-free|data race|double lock|unlock)",
    ),
}


EXTRA = "#include <sched.h>\n\n#include <atomic>\n\nextern int planted;"


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One program with all defects; the argument `planted=N` turns the Nth on."""
    core = tmp_path_factory.mktemp("planted")
    text = {file.name: file.read_text(encoding="utf-8") for file in CORE.iterdir() if file.suffix in (".h", ".cpp")}
    for number, (name, defect) in enumerate(DEFECTS.items(), 1):
        for old, new in defect.changes:
            assert text[defect.file].count(old) == 1, f"{name}: where is {old!r}?"
            text[defect.file] = text[defect.file].replace(old, re.sub(r"\bON\b", f"(::planted == {number})", new))
    text["sync.h"] = text["sync.h"].replace(
        "#include <atomic>", "#include <sched.h>\n#include <atomic>\nextern int planted;"
    )
    for file in ("pool.cpp", "pool.h", "sync.cpp", "sync.h", "planted.h"):
        (core / file).write_text(text[file], encoding="utf-8")
    return program("pool-driver-planted", core, [*THREAD, "-DPLANTED", "-DANABRANCH_PLANTED"])


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(planted: Path, name: str) -> None:
    defect = DEFECTS[name]
    number = list(DEFECTS).index(name) + 1
    found(planted, defect.status, defect.text, defect.scenario, f"planted={number}", "watchdog=1000")


def test_where_they_are_found_the_code_as_it_is_is_clean(planted: Path) -> None:
    for scenario in sorted({defect.scenario for defect in DEFECTS.values()}):
        run_clean(planted, *scenario.split())

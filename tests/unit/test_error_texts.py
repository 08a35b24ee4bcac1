"""Each error of the package says what was given, what was expected and what to do.

The test finds every ``raise`` (Python), ``throw`` and ``TORCH_CHECK`` (C++) with a text of its own, and every call that
ends a command with a text. ``error_texts.py`` has an entry for each of them. Add one when you add an error; the failure
prints the text without an entry. ``CASES`` makes some of the errors happen and looks at what they say then.
"""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import error_texts
import pytest
import torch

import anabranch
from anabranch import cpp, models
from anabranch.bench import find_system, find_work
from anabranch.check._case import cases_for, find_subject
from anabranch.explore import _program as program
from anabranch.explore import _schedule as schedule
from anabranch.explore import explore
from anabranch.plan import Buffer, Plan
from anabranch.race import check_lines

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/anabranch"

#: Functions that end a command with the text that they are given.
ENDS = ("refuse", "_refuse", "_fail", "_end", "fail", "BadParameter", "ClickException")


@dataclass(frozen=True)
class Site:
    """A place that makes an error. ``text`` is what it says, with ``{expression}`` for what is put in at run time."""

    file: str
    line: int
    end: int
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name}: {self.text!r}"


# -- Python -------------------------------------------------------------------------------------------------------


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    """A string expression as a template."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        if isinstance(node.value, ast.Name) and node.value.id in constants:
            return constants[node.value.id]
        return "{" + ast.unparse(node.value) + "}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    return "{" + ast.unparse(node) + "}"


def _literal(text: str) -> str:
    return re.sub(r"\{[^{}]*\}", "", text)


def python_sites(file: Path) -> list[Site]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    constants = {
        target.id: _text(node.value, {})
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.BinOp)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = [
        node.exc if isinstance(node, ast.Raise) else node
        for node in ast.walk(tree)
        if (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call))
        or (isinstance(node, ast.Call) and _name(node.func) in ENDS)
    ]
    # An error class that makes its text itself.
    calls += [
        node
        for made in ast.walk(tree)
        if isinstance(made, ast.ClassDef) and any(_name(b).endswith(("Error", "Exception")) for b in made.bases)
        for node in ast.walk(made)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__"
    ]
    sites = {}
    for call in calls:
        assert isinstance(call, ast.Call)
        # refuse() gets the command's name first.
        text = "".join(_text(argument, constants) for argument in call.args[_name(call.func) == "refuse" :])
        if re.search(r"[a-z]{3}", _literal(text)):
            name = _name(call.func)
            path = str(file.relative_to(ROOT))
            sites[call.lineno] = Site(path, call.lineno, call.end_lineno or call.lineno, name, text)
    return list(sites.values())


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


# -- C++ ----------------------------------------------------------------------------------------------------------

_STRING = r'"(?:[^"\\]|\\.)*"'


def cpp_sites(file: Path) -> list[Site]:
    source = re.sub(r"//[^\n]*", "", file.read_text(encoding="utf-8"))
    constants = dict(re.findall(rf"const std::string (\w+) = ({_STRING});", source))
    sites = []
    for match in re.finditer(r"\bthrow\s+([\w:]+)\(|\b(TORCH_CHECK\w*)\(", source):
        end = _closing(source, match.end())
        inside = source[match.end() : end]
        name = match[1] or match[2]
        if match[2]:  # the condition, and for some the class of the error, come first
            inside = ",".join(_split(inside)[2 if name == "TORCH_CHECK_WITH" else 1 :])
        for constant, value in constants.items():
            inside = re.sub(rf"(?<=\+ ){constant}\b", lambda _, value=value: value, inside)  # type: ignore[misc]
        text = "".join(
            part[1:-1].replace('\\"', '"').replace("\\n", "\n") if part.startswith('"') else "{}"
            for part in re.findall(rf"{_STRING}|[^\"]+", inside)
            if part.startswith('"') or re.search(r"\w", part)
        )
        if re.search(r"[a-z]{3}", _literal(text)):
            path, line = str(file.relative_to(ROOT)), source.count("\n", 0, match.start()) + 1
            sites.append(Site(path, line, line, name, text))
    return sites


def _closing(source: str, start: int) -> int:
    depth = 1
    for match in re.compile(rf"{_STRING}|[()]").finditer(source, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise AssertionError("no closing parenthesis")


def _split(arguments: str) -> list[str]:
    """Top-level arguments."""
    parts, depth, last = [], 0, 0
    for match in re.compile(rf"{_STRING}|[(){{}}\[\],]").finditer(arguments):
        if match[0] == "," and depth == 0:
            parts.append(arguments[last : match.start()])
            last = match.end()
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(match[0], 0)
    return [*parts, arguments[last:]]


_SCANNERS = {".py": python_sites, ".cpp": cpp_sites, ".h": cpp_sites}
SITES = [s for file in sorted(SOURCE.rglob("*")) if file.suffix in _SCANNERS for s in _SCANNERS[file.suffix](file)]


# -- the table ----------------------------------------------------------------------------------------------------


def _says(text: str, pieces: tuple[str, ...]) -> bool:
    """Whether a text has all of these pieces, each in a place of its own."""
    for piece in sorted(pieces, key=len, reverse=True):
        if piece not in text:
            return False
        text = text.replace(piece, "\0", 1)
    return True


def _entries(site: Site) -> list[tuple[str, ...]]:
    return [pieces for pieces in error_texts.TEXTS.get(site.file, []) if _says(site.text, pieces)]


def _internal(site: Site) -> bool:
    if site.name in error_texts.CAUGHT:
        return True
    return any(piece in site.text for piece, _ in error_texts.INTERNAL.get(site.file, []))


def test_the_sources_are_read() -> None:
    """The scanner finds what is known to be there."""
    assert len(SITES) > 200
    assert {Path(site.file).suffix for site in SITES} == {".py", ".cpp"}
    given = "src/anabranch/runtime/_given.py"
    assert any(
        s.file == given and s.text == "inputs is a single {type(inputs).__name__}; expected a list: inputs=[x]"
        for s in SITES
    )
    assert any(
        s.file.endswith("capture.cpp") and s.text == "sim: stream {} is under capture already; end that capture first"
        for s in SITES
    )


def test_each_error_text_has_an_entry() -> None:
    missing = [site for site in SITES if not _entries(site) and not _internal(site)]
    assert not missing, (
        "these errors have no entry in tests/unit/error_texts.py. Have each say what was given, what was expected and"
        " what to do, and add under its file the pieces of its text that say so:\n" + "\n".join(map(str, missing))
    )


def test_each_entry_is_of_an_error_text() -> None:
    """Nothing is left over, and no two texts of a file share an entry unless they say the same."""
    for file, entries in error_texts.TEXTS.items():
        sites = [site for site in SITES if site.file == file]
        for pieces in entries:
            assert any(_says(site.text, pieces) for site in sites), f"{file}: no error says {pieces}"
    for file, internal in error_texts.INTERNAL.items():
        sites = [site for site in SITES if site.file == file]
        for piece, why in internal:
            assert why
            assert any(piece in site.text for site in sites), f"{file}: no error says {piece!r}"
    for name, why in error_texts.CAUGHT.items():
        assert why
        assert any(site.name == name for site in SITES), name


#: A text asks for something: it says what is expected or needed, or it has a verb for the reader.
_ASKS = re.compile(
    r"\b(expected|expresses|needs?|must|each|runs?|takes|add|assign|begin|builds?|call|capture|change|check|choose|clears"
    r"|compile|copy|do|end|export|free|give|hold|install|launch|leave|link|load|make|measure|move|name|open|pass|put|raise"
    r"|record|register|remove|rename|replace|replay|return|save|see|set|start|try|unset|update|use|wait)\b",
    re.I,
)


def test_each_entry_says_what_was_given_and_what_to_do() -> None:
    for file, entries in error_texts.TEXTS.items():
        for pieces in entries:
            assert 2 <= len(pieces) <= 3, f"{file}: {pieces}: given, (expected,) what to do"
            assert all(re.search(r"[a-z{]", piece) for piece in pieces), f"{file}: {pieces}"
            # What to do may differ from case to case, and is then put in at run time.
            assert _ASKS.search(pieces[-1]) or re.fullmatch(r"\{(instead|advice)\}", pieces[-1]), (
                f"{file}: {pieces[-1]!r} does not say what to do"
            )


# -- errors that happen -------------------------------------------------------------------------------------------


class _Net(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


X = torch.rand(2, 3)


def _compile(*args: Any, **options: Any) -> Any:
    return anabranch.compile(*(args or (_Net(), [X])), **{"backend": "eager", "runtime": "python", **options})


def _closed() -> None:
    engine = _compile()
    engine.close()
    engine(X)


def _flagged() -> None:
    engine = _compile()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if before != "medium" else "highest")
        engine(torch.rand(5, 3))
    finally:
        torch.set_float32_matmul_precision(before)


def _buffers(*names: str) -> None:
    Plan("p", "cpu", "eager", (), tuple(Buffer(name, 4) for name in names), (), ())


#: Cheap to make happen; each is another error. The rest is in the tests of each part.
CASES: list[Callable[[], object]] = [
    lambda: _compile(backend="tvm"),
    lambda: _compile(runtime="rust"),
    lambda: _compile(precision=torch.float64),
    lambda: _compile(precision="absent.json"),
    lambda: _compile(precision=anabranch.Mixed(keep=["absent"])),
    lambda: anabranch.Mixed(torch.float32),
    lambda: anabranch.Mixed(keep="aten.softmax"),
    lambda: _compile(max_contexts=0),
    lambda: _compile(memory_limit=-1),
    lambda: _compile(backend="tensorrt"),
    lambda: _compile(_Net(), X),
    lambda: _compile(len, [X]),
    lambda: _compile(_Net(), [X, torch.empty(1, device="meta")]),
    lambda: _compile("absent.pt2", [X]),
    lambda: _compile(torch.nn.Linear(3, 4, device="meta"), [X]),
    _closed,
    _flagged,
    lambda: _compile(_Net(), [X.to_sparse()]),
    lambda: _compile(_Net(), [torch.rand(2, requires_grad=True)]),
    lambda: _compile(_Net(), [torch.rand(2, dtype=torch.complex64).conj()]),
    lambda: _compile(_Net(), [{1, 2}]),
    lambda: _compile(_Net(), [X.as_subclass(type("Other", (torch.Tensor,), {}))]),
    lambda: _compile()(torch.empty(2, 3, device="meta")),
    lambda: anabranch.Input((-1,)),
    lambda: anabranch.Input((1, 2), memory_format=torch.channels_last),
    lambda: anabranch.build(_Net(), [X], backend="eager", compute_capability="8.9"),
    lambda: anabranch.build(_Net(), [X], compute_capability="new"),
    lambda: find_subject("nonsense"),
    lambda: find_subject("math:absent"),
    lambda: find_subject("math:pi"),
    lambda: find_subject("not a module:make"),
    lambda: cases_for(find_subject("builtins:dict"), [torch.float32], None),
    lambda: find_work("nonsense"),
    lambda: find_work("my_package:make_model@1,x"),
    lambda: find_system("nonsense"),
    lambda: find_system("absent:make"),
    lambda: cpp.save_program(_Net(), [X]),
    lambda: cpp.save_program(_Net(), [X], "/absent/folder/file"),
    lambda: cpp.save_program(_compile(), [X], "/tmp/file"),
    lambda: models.upscaler(channels=1),
    lambda: explore(dict, oracles=["guess"]),
    lambda: explore(dict, schedules=0),
    lambda: explore(dict, scheduler="best"),
    lambda: program.load("absent.py"),
    lambda: program.load("absent_module:main"),
    lambda: program.load("math:absent"),
    lambda: program.load("math:pi"),
    lambda: program.parse("1 +"),
    lambda: schedule.parse("T0--"),
    lambda: check_lines([{"do": object()}]),
    lambda: Buffer("x", 4, "output of nothing"),
    lambda: Buffer("x", -4),
    lambda: _buffers("x", "x"),
]


def test_errors_say_it_when_they_happen() -> None:
    seen: dict[Site, int] = {}
    for number, case in enumerate(CASES):
        with pytest.raises(Exception, match=r"[a-z]{3}") as info:
            case()
        site = _raised_at(info.value)
        assert site not in seen, f"case {number}: {site} is case {seen.get(site)} already"
        seen[site] = number
        (pieces,) = _entries(site)[:1]
        for piece in pieces:
            for word in re.split(r"\{[^{}]*\}?", piece):
                assert word.strip() in str(info.value), f"{site}: {word!r} is not in {info.value}"
        assert "{" not in str(info.value).replace("{1, 2}", ""), info.value


def _raised_at(error: BaseException) -> Site:
    """The site of the innermost frame that is one: causes and helpers come after it."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    for file, line in reversed(frames):
        for site in SITES:
            if str(ROOT / site.file) == file and site.line <= line <= site.end:
                return site
    raise AssertionError(f"no site raised {error!r}")

"""Each error of the package says what was given, what was expected and what to do.

The test finds every ``raise`` (Python), ``throw`` and ``TORCH_CHECK`` (C++) with a text of its own, and every call that
ends a command with a text. ``error_texts.py`` has an entry for each of them. Add one when you add an error; the failure
prints the text without an entry. ``CASES`` makes some of the errors happen and looks at what they say then.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import error_texts

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/anabranch"

#: Functions that end a command with the text that they are given.
ENDS = ("_refuse", "_fail", "_end", "fail", "BadParameter", "ClickException")


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
        text = "".join(_text(argument, constants) for argument in call.args)
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


SITES = [
    site
    for file in sorted(SOURCE.rglob("*"))
    for site in (
        python_sites(file) if file.suffix == ".py" else cpp_sites(file) if file.suffix in (".cpp", ".h") else []
    )
]


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
    found = {site.file: site.text for site in SITES}
    assert len(SITES) > 200
    assert {Path(file).suffix for file in found} == {".py", ".cpp"}
    engine = "src/anabranch/runtime/_engine.py"
    assert any(
        s.file == engine and s.text == "inputs is a single {type(inputs).__name__}; expected a list: inputs=[x]"
        for s in SITES
    )
    assert any(
        s.file.endswith("capture.cpp") and s.text.startswith("sim: stream {} is under capture already;") for s in SITES
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


#: A text asks for something: it says what is expected, needed or required, or it has a verb for the reader.
_ASKS = re.compile(
    r"\b(expected|needs?|must|each|runs? on|takes|add|begin|build|builds|call|change|choose|compile|copy|do|end|export"
    r"|free|give|hold|install|launch|leave|link|make|measure|move|name|open|pass|put|raise|record|register|remove|rename"
    r"|replace|replay|return|run|runs|save|see|set|start|try|unset|update|use|wait)\b",
    re.I,
)


def test_each_entry_says_what_was_given_and_what_to_do() -> None:
    for file, entries in error_texts.TEXTS.items():
        for pieces in entries:
            assert 2 <= len(pieces) <= 3, f"{file}: {pieces}: given, (expected,) what to do"
            assert all(re.search(r"[a-z{]", piece) for piece in pieces), f"{file}: {pieces}"
            assert _ASKS.search(pieces[-1]), f"{file}: {pieces[-1]!r} does not say what to do"

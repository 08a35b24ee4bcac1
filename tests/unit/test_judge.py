"""The comparison that tools and tests share: what is right passes, and a wrong result of each kind is told."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch

from anabranch._judge import Rounding, differences, pair, relative_error, unequal, wrong
from anabranch.errors import CannotJudge

NAN, INF = float("nan"), float("inf")


class Box(NamedTuple):
    value: torch.Tensor
    name: str


@dataclass
class Record:
    value: Any
    count: int


def good() -> dict[str, Any]:
    """A nest with something of every kind; no tensor in it is the same in two calls."""
    x = torch.tensor([[1.5, -2.0, 0.25], [NAN, INF, -INF]])
    return {
        "plain": x,
        "zero": torch.tensor([0.0, -0.0, 3.0]),
        "small": torch.tensor([1e-40, 2.0]),
        "half": torch.tensor([1.0, -3.5, NAN], dtype=torch.float16),
        "double": torch.tensor([1.0, 1e300], dtype=torch.float64),
        "eighth": torch.tensor([1.0, 2.0]).to(torch.float8_e5m2),
        "int": torch.tensor([3, -7]),
        "byte": torch.tensor([200, 1], dtype=torch.uint8),
        "short": torch.tensor([60_000, 2], dtype=torch.int32).to(torch.uint16),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j, complex(NAN, -1.0), complex(0.0, INF)]),
        "empty": torch.empty(0, 3),
        "box": Box(torch.tensor(5.0), "five"),
        "record": Record([torch.tensor([7.0])], 2),
        "list": [None, 3, 2.5, True, "text", torch.Size([2, 3]), torch.float16, 1 - 2j],
    }


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """The nest with one entry replaced; ``value`` may be a function of the old entry."""

    def change(nest: dict[str, Any]) -> Any:
        nest[path] = value(nest[path]) if callable(value) else value
        return nest

    return change


def put(index: Any, value: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(x: torch.Tensor) -> torch.Tensor:
        x[index] = value
        return x

    return change


def item(i: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda xs: [*xs[:i], value, *xs[i + 1 :]]


#: A wrong result, and words that the report must have.
WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another value": (
        changed("plain", put((0, 1), -2.5)),
        r"output\['plain'\] differs in 1 of 6 .*-2.5, expected -2.0",
    ),
    "NaN for a number": (changed("plain", put((0, 0), NAN)), "1 with NaN where a number is expected"),
    "a number for NaN": (changed("plain", put((1, 0), 0.0)), "1 with a number where NaN is expected"),
    "NaN everywhere": (changed("plain", lambda x: x * NAN), "5 of 6"),
    "no infinity": (changed("plain", put((1, 1), 3e38)), "no infinity where one is expected"),
    "an infinity": (changed("plain", put((0, 2), INF)), "an infinity where none is expected"),
    "another infinity": (changed("plain", put((1, 2), INF)), "an infinity of the wrong sign"),
    "zeros": (changed("zero", torch.zeros_like), "all zeros"),
    "a half": (changed("half", put(1, -3.0)), r"output\['half'\]"),
    "a half NaN": (changed("half", put(2, 1.0)), "a number where NaN is expected"),
    "a double": (changed("double", put(1, 1.01e300)), r"output\['double'\]"),
    "eight bits": (changed("eighth", lambda x: torch.tensor([1.0, 4.0]).to(x.dtype)), r"output\['eighth'\]"),
    "an integer": (changed("int", put(0, 4)), r"output\['int'\] differs in 1 of 2 .*: 4, expected 3"),
    "a byte": (changed("byte", put(0, 201)), "201, expected 200"),
    "a short": (changed("short", lambda x: torch.tensor([60_001, 2]).to(x.dtype)), "60001, expected 60000"),
    "a boolean": (changed("bool", put(1, True)), "True, expected False"),
    "the real part": (changed("complex", put(0, 1.5 + 2j)), "element .0,., real part: 1.5, expected 1.0"),
    "the imaginary part": (changed("complex", lambda x: x.conj()), "imaginary part: -2.0, expected 2.0"),
    "a NaN part": (changed("complex", put(1, complex(NAN, NAN))), "1 with NaN where a number is expected"),
    "a NaN in the other part": (changed("complex", put(1, complex(-1.0, NAN))), "2 of 6 parts"),
    "an infinite part": (changed("complex", put(2, complex(INF, 0.0))), "an infinity where none is expected"),
    "another dtype": (changed("plain", torch.Tensor.double), "is float64, expected float32"),
    "an integer dtype": (changed("int", torch.Tensor.int), "is int32, expected int64"),
    "another shape": (changed("plain", lambda x: x[:1]), r"shape \[1, 3\], expected \[2, 3\]"),
    "another empty shape": (changed("empty", lambda x: x.reshape(3, 0)), r"shape \[3, 0\], expected \[0, 3\]"),
    "other strides": (changed("plain", lambda x: x.t().contiguous().t()), r"strides \[1, 2\], expected \[3, 1\]"),
    "sparse": (changed("plain", torch.Tensor.to_sparse), "layout sparse_coo, expected a plain tensor"),
    "no tensor": (changed("plain", None), "is None, expected a Tensor"),
    "a number for a tensor": (changed("box", lambda b: b._replace(value=5.0)), r"output\['box'\].value is the float"),
    "a tuple for a named tuple": (changed("box", tuple), "is a tuple, expected a .*Box"),
    "another string": (changed("box", lambda b: b._replace(name="four")), "'four', expected 'five'"),
    "another field": (changed("record", lambda r: replace(r, count=3)), r"output\['record'\].count is 3, expected 2"),
    "inside a field": (changed("record", lambda r: replace(r, value=[r.value[0] + 1])), r"\['record'\].value\[0\]"),
    "a tuple for a list": (changed("list", tuple), "is a tuple, expected a list"),
    "one more": (changed("list", lambda xs: [*xs, 1]), r"output\['list'\] has .*, expected"),
    "something for None": (changed("list", item(0, 0)), r"\[0\] is the int 0, expected None"),
    "a float for an int": (changed("list", item(1, 3.0)), "is the float 3.0, expected the int 3"),
    "another number": (changed("list", item(2, 2.75)), "2.75, expected 2.5"),
    "an int for a bool": (changed("list", item(3, 1)), "is the int 1, expected the bool True"),
    "a tuple for a size": (changed("list", item(5, (2, 3))), "is a tuple, expected a Size"),
    "another size": (changed("list", item(5, torch.Size([2, 4]))), r"\[5\]\[1\] is 4, expected 3"),
    "another dtype object": (changed("list", item(6, torch.float32)), "torch.float32, expected torch.float16"),
    "another complex number": (changed("list", item(7, 1 + 2j)), r"\(1\+2j\), expected \(1-2j\)"),
    "another order": (lambda n: dict(reversed(n.items())), r"the output has \['list'\]"),
    "a key less": (lambda n: {k: n[k] for k in n if k != "int"}, "the output has"),
    "another dict": (lambda n: OrderedDict(n), "a collections.OrderedDict, expected a dict"),
    "nothing": (lambda n: None, "the output is None, expected a dict"),
}
#: Wrong bit for bit; rounding allows it.
ROUNDED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "the last bit": (changed("plain", put((0, 0), 1.5 + 2**-22)), "differs in 1 of 6"),
    "a half's last bit": (changed("half", put(1, -3.502)), r"output\['half'\]"),
    "no negative zero": (changed("zero", put(1, 0.0)), "a zero of the wrong sign"),
    "a flushed subnormal": (changed("small", put(0, 0.0)), r"output\['small'\]"),
    "the last bit of a part": (changed("complex", put(0, 1 + 2.000001j)), "imaginary part"),
    "a number's last digit": (changed("list", item(2, 2.5000001)), "2.5000001, expected 2.5"),
    "a number's last digit, complex": (changed("list", item(7, 1.0000001 - 2j)), "expected"),
}


def test_what_is_right_has_no_differences() -> None:
    for rounding in (None, Rounding()):
        assert differences(good(), good(), rounding=rounding) == []


@pytest.mark.parametrize("name", [*WRONG, *ROUNDED])
def test_a_wrong_result_of_each_kind_is_told(name: str) -> None:
    change, words = {**WRONG, **ROUNDED}[name]
    (line, *_) = differences(change(good()), good())
    assert re.search(words, line), line
    rounded = differences(change(good()), good(), rounding=Rounding())
    assert bool(rounded) == (name in WRONG), rounded


def test_rounding_is_relative_to_the_largest_finite_magnitude_and_never_for_integers() -> None:
    expected = torch.tensor([100.0, 0.0, INF])
    assert not differences(expected + torch.tensor([0.0, 9e-4, 0.0]), expected, rounding=Rounding())
    (line,) = differences(expected + torch.tensor([0.0, 2e-3, 0.0]), expected, rounding=Rounding())
    assert "largest relative error 2.0e-05, at most 1.0e-05 allowed" in line
    small, off = torch.tensor([2e-8, 0.0]), torch.tensor([0.0, 9e-6])
    assert differences(off, small, rounding=Rounding())
    assert not differences(off, small, rounding=Rounding(least=1.0))
    assert differences(off * 2, small, rounding=Rounding(least=1.0))
    assert differences(torch.tensor([10_000_001]), torch.tensor([10_000_000]), rounding=Rounding())
    assert [Rounding().of(d) for d in (torch.float32, torch.float16, torch.complex64, torch.int8)] == [
        1e-5,
        16 * 2**-10,
        1e-5,
        0.0,
    ]


def test_a_zero_of_the_wrong_sign_is_told_where_it_is_asked_for() -> None:
    actual, expected = torch.tensor([0.0, 2.0]), torch.tensor([-0.0, 2.0])
    assert differences(actual, expected)
    assert not differences(actual, expected, signed_zeros=False)
    assert not differences(actual, expected, rounding=Rounding())
    assert differences(actual, expected, rounding=Rounding(), signed_zeros=True)
    assert differences(0.0, -0.0)


def test_a_nan_is_a_nan_but_where_its_bits_are_asked_for() -> None:
    a, b = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, -0x400000 + 1))
    assert a.isnan()
    assert b.isnan()
    assert not differences(a, b)
    assert differences(a, b, nan_bits=True)
    assert not differences(a, a.clone(), nan_bits=True)


def test_postponed_conjugates_and_minus_signs_are_values_like_others() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert not differences(z.conj(), z.conj().resolve_conj())
    assert differences(z.conj(), z)
    assert not differences(z.conj().imag, -z.imag, strides=False)
    assert differences(z.conj().imag, z.imag)


def test_strides_count_only_where_they_lead_somewhere() -> None:
    assert not differences(torch.empty_strided((1, 3), (7, 1)).fill_(2.0), torch.full((1, 3), 2.0))
    assert not differences(torch.empty_strided((0, 3), (1, 9)), torch.empty(0, 3))
    x = torch.randn(2, 3)
    assert differences(x.t().contiguous().t(), x)
    assert not differences(x.t().contiguous().t(), x, strides=False)
    assert differences(torch.ones(1).expand(4), torch.ones(4))


@pytest.mark.parametrize(
    ("actual", "expected", "words"),
    [
        (lambda x: x, lambda x: x.clone(), "output shares memory with input 0; expected memory of its own"),
        (lambda x: x.clone(), lambda x: x, "does not share memory with input 0; expected to share it"),
        (lambda x: x[1:], lambda x: x[:-1], "begins at another element of input 0's memory"),
        (lambda x: [x * 2] * 2, lambda x: [x * 2, x * 2], r"output\[1\] shares memory with output\[0\]"),
        (lambda x: [x * 2, x * 2], lambda x: [x * 2] * 2, r"output\[1\] does not share memory with output\[0\]"),
        (lambda x: x.imag, lambda x: x.imag.clone(), "shares memory"),
    ],
)
def test_shared_memory_is_compared(actual: Any, expected: Any, words: str) -> None:
    x = torch.full((4, 3), 2 + 2j)
    assert not differences(expected(x), expected(x), inputs=[x], strides=False)
    found = differences(actual(x), expected(x), inputs=[x], strides=False)
    assert re.search(words, found[0]), found
    # The same with inputs of each its own.
    y = x.clone()
    assert not differences(expected(x), expected(y), inputs=[x], expected_inputs=[y], strides=False)
    assert differences(actual(x), expected(y), inputs=[x], expected_inputs=[y], strides=False) == found


def test_an_inference_tensor_is_told() -> None:
    with torch.inference_mode():
        x = torch.ones(2)
    assert differences(x, torch.ones(2)) == ["the output is an inference tensor, expected an ordinary one"]


class Unknown:
    pass


class Wrapped(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "layout sparse_coo.*to_dense"),
        (lambda: torch.eye(4).to_sparse_csr(), "layout sparse_csr.*to_dense"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "quantized.*dequantize"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested.*to_padded_tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "Nested"),
        (lambda: torch.empty(2, device="meta"), "meta device"),
        (lambda: torch.ones(2).as_subclass(Wrapped), "Wrapped.*plain tensors"),
        (Unknown, "Unknown, which cannot be compared"),
        (lambda: {torch.ones(1)}, "a set of tensors"),
    ],
)
def test_what_cannot_be_judged_is_an_error_that_names_the_output(make: Any, words: str) -> None:
    with pytest.raises(CannotJudge, match=rf"output\['y'\]\[0\] is .*{words}"):
        differences({"y": [make()]}, {"y": [make()]})


def test_a_result_that_holds_itself_is_an_error() -> None:
    xs: list[Any] = [1]
    xs.append(xs)
    with pytest.raises(CannotJudge, match="holds itself"):
        differences(xs, xs)


def test_arrays_are_compared() -> None:
    np = pytest.importorskip("numpy")
    assert not differences(np.ones(3), np.ones(3))
    assert differences(np.ones(3), np.zeros(3))
    assert differences(np.ones(3), np.ones(3, dtype="float32"))


def test_dtypes_of_one_family_pair_where_the_reference_is_wider() -> None:
    found, pairs = pair([torch.ones(2).half(), torch.tensor([1])], [torch.ones(2), torch.tensor([1])], dtypes=False)
    assert found == []
    assert [p.name for p in pairs] == ["output[0]", "output[1]"]
    assert not any(bool(wrong(p.actual, p.expected, 1e-3).any()) for p in pairs)
    assert pair(torch.tensor([1]), torch.ones(1), dtypes=False)[0]
    assert pair(torch.ones(1, dtype=torch.complex64), torch.ones(1), dtypes=False)[0]


def test_the_error_is_infinite_where_no_bound_could_pass_it() -> None:
    assert float(relative_error(torch.tensor([1.0, 4.04]), torch.tensor([1.0, 4.0]))) == pytest.approx(0.01)
    assert float(relative_error(torch.tensor([3.0, NAN, -INF]), torch.tensor([3.0, NAN, -INF]))) == 0.0
    for actual, expected in (([NAN], [1.0]), ([1.0], [NAN]), ([INF], [1.0]), ([-INF], [INF]), ([1.0], [-INF])):
        assert float(relative_error(torch.tensor(actual), torch.tensor(expected))) == INF, (actual, expected)
        assert wrong(torch.tensor(actual), torch.tensor(expected), 1e9).all(), (actual, expected)
    assert float(relative_error(torch.tensor([2]), torch.tensor([3]))) == INF
    assert float(relative_error(torch.empty(0), torch.empty(0))) == 0.0
    assert unequal(torch.tensor([1 + 1j]), torch.tensor([1 - 1j])).tolist() == [[False, True]]

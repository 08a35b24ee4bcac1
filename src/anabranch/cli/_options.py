"""What several commands' options have in common."""

from __future__ import annotations

from typing import Any

import click

#: Floating-point types that models are run in, by PyTorch's names.
DTYPES = ("float32", "float16", "bfloat16")


class Shape(click.ParamType):  # type: ignore[type-arg]  # generic in click's stubs only
    """Sizes separated by commas."""

    name = "1,3,5"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        try:
            shape = tuple(int(n) for n in str(value).split(","))
        except ValueError:
            self.fail(
                f"{value!r} is not a shape; expected sizes separated by commas, such as 1,3,2160,3840", param, ctx
            )
        if any(n < 0 for n in shape):
            self.fail(f"{value!r}: sizes must be 0 or more", param, ctx)
        return shape

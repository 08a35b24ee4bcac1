"""The ``anabranch`` command: the options of each subcommand, a module each.

What a subcommand does is in the ``_command.py`` beside the code that it runs, and is imported when it runs. So a help
text and a wrong option need no PyTorch.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from anabranch import _exit

#: subcommand -> (module, attribute, one line of help). Kept as text so that each run imports one of them.
_COMMANDS = {
    "bench": ("anabranch.cli._bench", "command", "Measure all systems on the same work, and check their outputs."),
    "build": ("anabranch.cli._build", "command", "Build TensorRT engines ahead of time. A GPU is not needed."),
    "calibrate": ("anabranch.cli._calibrate", "command", "Find which operators can be in half precision, on samples."),
    "check": ("anabranch.cli._check", "command", "Call an engine on many streams at once; compare every output."),
    "explore": ("anabranch.cli._explore", "command", "Run a program under every order of its threads and streams."),
    "race": ("anabranch.cli._race", "command", "Find races in a trace of stream events."),
}


class _Lazy(click.Group):
    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Run it; unless ``standalone_mode`` is off, exit with a status, which ``_exit.run`` says more about."""
        start: Any = super().main
        if not standalone_mode:
            return start(*args, standalone_mode=False, **more)
        given = args[0] if args else more.get("args")
        words = list(sys.argv[1:] if given is None else given)
        name = f"anabranch {words[0]}" if words and words[0] in _COMMANDS else "anabranch"
        _exit.run(name, lambda: start(*args, standalone_mode=False, **more))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, attribute, _ = entry
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][2]) for name in self.list_commands(ctx)])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="anabranch")
def main() -> None:
    """Check, build and measure inference engines for PyTorch; find missing waits in programs with streams."""

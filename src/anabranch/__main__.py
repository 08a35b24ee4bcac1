"""``python -m anabranch``: the command, where it is not installed."""

from anabranch.cli import main

main()

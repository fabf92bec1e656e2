"""The command line: ``python -m grjca <command>``."""

from __future__ import annotations

import argparse
import sys

from grjca import demo


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m grjca", description="Gated recursive joint cross-attention.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in (("demo", demo),):
        summary = (module.__doc__ or "").partition(": ")[2]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

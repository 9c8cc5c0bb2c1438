"""``python -m pyallreduce`` and ``pyallreduce``: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pyallreduce import __version__

COMMANDS = {
    "doctor": "say what this installation and machine offer",
    "bench": "measure collectives, with the columns of nccl-tests",
    "plan": "print or pin the choice of schedules, buckets and chunks",
    "trace": "merge the ranks' event records into one trace",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a usage error."""
    parser = argparse.ArgumentParser(prog="pyallreduce", description=__doc__)
    parser.add_argument("--version", action="version", version=f"pyallreduce {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=f"{purpose} (planned)")
    arguments = parser.parse_args(argv)
    print(f"pyallreduce: `{arguments.command}` is planned, not there yet", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

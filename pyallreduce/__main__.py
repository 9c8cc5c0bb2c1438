"""``python -m pyallreduce`` and ``pyallreduce``: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pyallreduce import __version__
from pyallreduce.cli import bench, doctor, trace
from pyallreduce.errors import Error, UsageError

PLANNED = {
    "plan": "print or pin the choice of schedules, buckets and chunks",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for an error or wrong data, 2 for a usage error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(arguments)
    if options.command in PLANNED:
        print(f"pyallreduce: `{options.command}` is planned, not there yet", file=sys.stderr)
        return 2
    try:
        match options.command:
            case "bench":
                return bench.run(options, arguments)
            case "doctor":
                return doctor.run(options)
            case _:
                return trace.run(options)
    except UsageError as error:
        print(f"pyallreduce {options.command}: {error}", file=sys.stderr)
        return 2
    except Error as error:
        print(f"pyallreduce {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyallreduce", description="All-reduce for data-parallel PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"pyallreduce {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module, purpose in (
        ("doctor", doctor, "say what this installation and this machine offer"),
        ("bench", bench, "measure collectives, with the flags and columns of nccl-tests"),
        ("trace", trace, "merge the ranks' event records into one trace"),
    ):
        command = commands.add_parser(
            name,
            help=purpose,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
    for name, purpose in PLANNED.items():
        commands.add_parser(name, help=f"{purpose} (planned)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

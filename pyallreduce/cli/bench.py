"""``pyallreduce bench``: time a collective over a range of sizes, with the flags and columns of nccl-tests."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyallreduce import _core, launch
from pyallreduce.cli.local_ranks import run_local_ranks
from pyallreduce.errors import UsageError

DESCRIPTION = """\
Times a collective between the ranks that torchrun, mpirun or srun started, or that --nproc starts. Flags, columns and
units are those of nccl-tests: sizes in bytes (K, M, G are powers of 1024), times in microseconds, bandwidths in GB/s
of 1e9 bytes; algbw = size / time, busbw = algbw x 2(n-1)/n for all_reduce, (n-1)/n for reduce_scatter and all_gather,
1 for broadcast. out-of-place: plain tensors; in-place: symmetric memory (comm.symmetric_empty).

  pyallreduce bench all_reduce -b 1K -e 64M -f 4 --nproc 2
  torchrun --nproc-per-node 2 -m pyallreduce bench all_gather -d bfloat16

Exit code 0, 1 for an error or wrong data, 2 for a usage error.
"""
DATATYPES = {  # name in nccl-tests: name in torch
    "uint8": "uint8",
    "int32": "int32",
    "int64": "int64",
    "half": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "double": "float64",
}
INTEGERS = ("uint8", "int32", "int64")
OPS = ("sum", "prod", "max", "min", "avg")
AVERAGES = ("rank 0", "avg", "min", "max")
ALL = "all"


@dataclass(frozen=True)
class Collective:
    name: str
    reduces: bool = False  # has an op
    has_root: bool = False
    by_shard: bool = False  # `count` elements per rank on one side, size x count on the other

    def bus_factor(self, size: int) -> float:
        """busbw / algbw: what makes it comparable with a link's bandwidth, whatever the number of ranks."""
        if self.has_root:
            return 1.0
        return (size - 1) / size * (1.0 if self.by_shard else 2.0)


COLLECTIVES = {
    c.name: c
    for c in (
        Collective("all_reduce", reduces=True),
        Collective("reduce_scatter", reduces=True, by_shard=True),
        Collective("all_gather", by_shard=True),
        Collective("broadcast", has_root=True),
    )
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, steps = parser.add_argument, parser.add_mutually_exclusive_group()
    # fmt: off
    add("collective", nargs="?", default="all_reduce", choices=COLLECTIVES,
        help="default: all_reduce")
    add("-b", "--minbytes", type=number_of_bytes, default=32 << 20, metavar="SIZE",
        help="size of the first row (default: 32M)")
    add("-e", "--maxbytes", type=number_of_bytes, default=32 << 20, metavar="SIZE",
        help="size that no row exceeds (default: 32M)")
    steps.add_argument("-i", "--stepbytes", type=number_of_bytes, default=1 << 20, metavar="SIZE",
        help="add this from row to row (default: 1M)")
    steps.add_argument("-f", "--stepfactor", type=int, metavar="F",
        help="multiply by this from row to row")
    add("-o", "--op", default="sum", choices=(*OPS, ALL),
        help="default: sum")
    add("-d", "--datatype", type=datatype, default="float", metavar="TYPE",
        help=f"{', '.join(DATATYPES)}, torch's names of them, or all (default: float)")
    add("-r", "--root", type=root, default=0, metavar="RANK",
        help="of a broadcast: a rank or all (default: 0)")
    add("-n", "--iters", type=positive, default=20, metavar="N",
        help="timed calls (default: 20)")
    add("-w", "--warmup_iters", "--warmup-iters", type=count, default=1, metavar="N",
        help="calls before that (default: 1)")
    add("-c", "--check", type=count, default=1, metavar="N",
        help="calls whose results are verified, after the timed ones (default: 1)")
    add("-a", "--average", type=int, choices=range(4), default=1,
        help="time of which rank: 0 of rank 0, 1 mean, 2 min, 3 max (default: 1)")
    add("-I", "--per_iter_timing", "--per-iter-timing", type=int, choices=(0, 1), nargs="?", const=1, default=0,
        help="also i_min i_max i_p99 i_cv%% over the calls, each that of its slowest rank")
    add("-J", "--json", "--output_file", "--output-file", type=Path, metavar="FILE",
        help="also write the results as JSON")
    add("-T", "--timeout", type=float, metavar="S",
        help="seconds a call waits for its peers (default: PYALLREDUCE_TIMEOUT_S or 60)")
    add("--backend", choices=("pyallreduce", "gloo"), default="pyallreduce",
        help="gloo: torch.distributed's, in the same format")
    add("--nproc", type=positive, metavar="N",
        help="ranks to start on this host; without a launcher (default: 2)")
    # fmt: on


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """As one of the launcher's ranks, or starts ranks of its own with the same ``argv``. Returns the exit code."""
    check(options)
    _core.read_env()  # its errors once, not from every rank
    found = launch.detect(os.environ)
    if found.launcher != "single":
        if options.nproc is not None:
            raise UsageError(f"{found.launcher} has started this process; leave out --nproc")
    elif options.nproc != 1:
        command = [sys.executable, "-m", "pyallreduce", *without_nproc(argv)]
        return run_local_ranks(command, options.nproc or 2)
    try:
        return run_rank(options, found)
    except UsageError as error:  # every rank has the same
        if found.rank == 0:
            print(f"pyallreduce bench: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError, OSError) as error:  # ours, gloo's, a pipe that was closed
        text = f"pyallreduce bench, rank {found.rank}: {type(error).__name__}: {error}\n"
        sys.stderr.write(text)  # in one piece: the ranks share stderr
        return 1


def run_rank(options: argparse.Namespace, found: launch.Launch) -> int:
    """Collective. Returns 1 if an element was wrong, else 0."""
    # They need torch, which starting ranks does not.
    from pyallreduce.cli.backends import make_backend
    from pyallreduce.cli.measure import Bench
    from pyallreduce.cli.table import Table

    backend = make_backend(options.backend, found, options.timeout)
    if options.root != ALL and options.root >= backend.size:
        raise UsageError(f"-r {options.root}: the ranks are 0 to {backend.size - 1}")
    table, bench = Table(options, backend), Bench(options, backend)
    for case in cases(options, backend.size):
        for nbytes in sizes(options):
            count = bench.count(case, nbytes)
            halves = [bench.result(case, count, symmetric=False)]
            if backend.symmetric:
                halves.append(bench.result(case, count, symmetric=True))
            table.add(case, bench.nbytes(case, count), count, halves)
    table.end()
    backend.close()
    return 1 if table.num_wrong else 0


def check(options: argparse.Namespace) -> None:
    """What argparse does not see; UsageError."""
    if options.minbytes > options.maxbytes:
        raise UsageError(f"-b {options.minbytes} is more than -e {options.maxbytes}")
    if options.stepfactor is not None and (options.stepfactor < 2 or options.minbytes == 0):
        raise UsageError("-f multiplies: it must be at least 2, and -b more than 0")
    if options.stepfactor is None and options.stepbytes == 0:
        raise UsageError("-i 0 never comes to an end")
    if options.timeout is not None and not 0 < options.timeout < math.inf:
        raise UsageError(f"-T {options.timeout}: a positive number of seconds is needed")
    if COLLECTIVES[options.collective].reduces and not list(cases(options, size=1)):
        raise UsageError(f"-o avg -d {options.datatype} would round; use -o sum")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UsageError(f"-J {options.json}: there is no folder {options.json.parent}")


def without_nproc(argv: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc")
    return parser.parse_known_args(argv)[1]


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One block of rows."""

    datatype: str
    op: str  # "none" for collectives that do not reduce
    root: int  # -1 for collectives without


def cases(options: argparse.Namespace, size: int) -> Iterator[Case]:
    collective = COLLECTIVES[options.collective]
    ops: tuple[str, ...] = ("none",)
    if collective.reduces:
        ops = OPS if options.op == ALL else (options.op,)
    roots = [-1]
    if collective.has_root:
        roots = list(range(size)) if options.root == ALL else [options.root]
    for name in DATATYPES if options.datatype == ALL else (options.datatype,):
        for op in ops:
            if not (op == "avg" and name in INTEGERS):
                yield from (Case(name, op, one) for one in roots)


def sizes(options: argparse.Namespace) -> Iterator[int]:
    """Bytes per row, as asked for."""
    nbytes = options.minbytes
    while nbytes <= options.maxbytes:
        yield nbytes
        nbytes = nbytes * options.stepfactor if options.stepfactor else nbytes + options.stepbytes


# --- types of arguments ----------------------------------------------------------------------------------------------


def number_of_bytes(text: str) -> int:
    """``64K``: 65536."""
    powers = {"K": 10, "M": 20, "G": 30}
    unit = powers.get(text[-1:].upper(), 0)
    number = float(text[:-1] if unit else text) * 2.0**unit
    if not 0 <= number < 2.0**63:
        raise ValueError(text)
    return int(number)


def count(text: str) -> int:
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def datatype(text: str) -> str:
    if text in DATATYPES or text == ALL:
        return text
    by_torch_name = {torch_name: name for name, torch_name in DATATYPES.items()}
    if text not in by_torch_name:
        raise ValueError(text)
    return by_torch_name[text]


def root(text: str) -> int | str:
    return ALL if text == ALL else count(text)

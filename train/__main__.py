"""`python -m train classify ...`

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 target missed (--assert-top1), 75 stopped by SIGTERM
or SIGUSR1, or by the end of torchrun, with a checkpoint, to be started again with --resume; 130
stopped by Ctrl-C without.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing

import pyallreduce as par
from train import launch, signals
from train.config import Config, parse

COMMANDS = {
    "classify": "train an image classifier with the paper's recipe",
    "compare": "set runs side by side on one page, with mean and deviation over seeds",
    "report": "draw a run's pictures and report.html again, from its records",
    "data-bench": "compare the loader's images/s with what the model needs",
    "prepare": "make tar shards of a folder of images",
    "export": "write a run's weights as safetensors",
}
DONE, FAILED, USAGE, MISSED = range(4)
STOPPED = os.EX_TEMPFAIL


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code. What all ranks would say, rank 0 says, on stderr."""
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_help())
            return DONE if argv else USAGE
        command, arguments = argv[0], list(argv[1:])
        if command not in COMMANDS:
            raise par.UsageError(
                f"given command {command!r}, accepted: {', '.join(COMMANDS)}; "
                "for example: python -m train classify --preset digits --nproc 2"
            )
        if command != "classify":  # a module of its own, which says what it takes
            return importlib.import_module(f"train.{command.replace('-', '_')}").main(arguments)
        cfg = parse(command, arguments)
        launcher = launch.launched_by(os.environ)
        if cfg.nproc and launcher not in (None, launch.OURSELVES):
            raise par.UsageError(
                f"--nproc: given {cfg.nproc}, but {launcher} has already started this "
                "process; leave --nproc out, or start without the launcher"
            )
        if cfg.nproc and cfg.nproc > 1 and not launcher:
            return launch.run_ranks(argv, cfg.nproc)
        return _rank(cfg)
    except par.UsageError as error:
        if launch.announced_rank(os.environ) == 0:
            print(f"python -m train: error: {error}", file=sys.stderr)
        return USAGE
    except (par.Error, OSError) as error:
        rank = launch.announced_rank(os.environ)
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _rank(cfg: Config) -> int:
    """This process as one rank of the job."""
    signals.listen(needs_parent=launch.launched_by(os.environ) == "torchrun")
    # Heavy imports only here: the parent of --nproc and --help do without torch.
    import torch
    from torch.distributed.elastic.multiprocessing.errors import record

    from train.collective import Failure
    from train.runs import train_runs
    from train.watch import Interrupted

    @record  # torchrun's summary then shows this rank's traceback
    def job() -> int:
        with closing(par.init(timeout_s=cfg.timeout_s)) as comm:
            if comm.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.local_size))
            say = print if comm.rank == 0 else _nothing  # what all ranks know in the same words
            try:
                summary = train_runs(cfg, comm)
            except Interrupted as request:
                say(
                    f"python -m train: {request}; the checkpoint of iteration {request.step} is "
                    "written, --resume continues from it",
                    file=sys.stderr,
                )
                return STOPPED
            except (Failure, FloatingPointError) as error:
                say(f"python -m train: error: {error}", file=sys.stderr)
                return FAILED
            if cfg.json:
                say(json.dumps(summary))
        if cfg.assert_top1 is not None and summary["accuracy_median"] < cfg.assert_top1:
            say(
                f"python -m train: accuracy {summary['accuracy_median']:.2f} % is below the "
                f"{cfg.assert_top1:g} % asked for by --assert-top1",
                file=sys.stderr,
            )
            return MISSED
        return DONE

    return job() or DONE


def _nothing(*_: object, **__: object) -> None:
    pass


def _help() -> str:
    lines = [f"  {name:10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m train COMMAND [flags]",
            "",
            "commands:",
            *lines,
            "",
            "'python -m train COMMAND --help' lists the flags with their defaults.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

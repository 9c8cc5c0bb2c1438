"""Finds out who started this process: torchrun, mpirun, srun, or nobody."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pyallreduce.errors import UsageError

OWN_PORT_OFFSET = 1  # MASTER_PORT itself is left to torch.distributed.init_process_group


@dataclass(frozen=True)
class Launch:
    """Who this process is, and where rank 0 can be met (address and port mean nothing for ``single``)."""

    launcher: str  # "torchrun", "mpirun", "srun", "torch.distributed" or "single"
    rank: int = 0
    size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    agent_store: bool = False  # torchrun's agent already listens on address:port


def detect(env: Mapping[str, str], port: int = 0) -> Launch:
    """Reads the launcher's variables. ``port``: the user's choice for the rendezvous, 0 for none.

    Open MPI comes before Slurm: mpirun inside an allocation inherits the SLURM_* of its daemon, which srun started.
    MPICH's PMI_* come after Slurm: srun can set them too. UsageError when a launcher's set is incomplete.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        return _torchrun(env, port)
    if "OMPI_COMM_WORLD_RANK" in env or "OMPI_COMM_WORLD_SIZE" in env:
        return _mpirun(env, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    if _started_by_srun(env):
        return _srun(env, port)
    if "PMI_RANK" in env or "PMI_SIZE" in env:
        return _mpirun(env, "PMI_RANK", "PMI_SIZE")
    return Launch("single")


def _torchrun(env: Mapping[str, str], port: int) -> Launch:
    rank, size = _identity(env, "RANK", "WORLD_SIZE", "torchrun")
    if size == 1:
        return Launch("torchrun", rank, size)
    address = _needed(env, "MASTER_ADDR", "torchrun")
    master_port = _integer(env, "MASTER_PORT", "torchrun")
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not port:
        return Launch("torchrun", rank, size, address, master_port, agent_store=True)
    return Launch("torchrun", rank, size, address, port or master_port + OWN_PORT_OFFSET)


def _mpirun(env: Mapping[str, str], rank_name: str, size_name: str) -> Launch:
    rank, size = _identity(env, rank_name, size_name, "mpirun")
    return Launch("mpirun", rank, size)


def _started_by_srun(env: Mapping[str, str]) -> bool:
    batch_step = str(
        0xFFFFFFFB
    )  # the script of sbatch itself: one process, whatever SLURM_NTASKS says
    return (
        "SLURM_PROCID" in env
        and env.get("SLURM_NTASKS", "1") != "1"
        and env.get("SLURM_STEP_ID") != batch_step
    )


def _srun(env: Mapping[str, str], port: int) -> Launch:
    rank, size = _identity(env, "SLURM_PROCID", "SLURM_NTASKS", "srun")
    address = env.get("MASTER_ADDR")
    if address is None:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or ""
        alone = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")) == "1"
        address = "127.0.0.1" if alone or not nodes else first_host(nodes)
    if not port and "MASTER_PORT" in env:
        port = _integer(env, "MASTER_PORT", "srun") + OWN_PORT_OFFSET
    if not port:  # outside Linux's ephemeral range; steps of one job and neighbouring jobs differ
        job = _integer(env, "SLURM_JOB_ID", "srun")
        port = 10000 + (job * 31 + int(env.get("SLURM_STEP_ID", "0"))) % 20000
    return Launch("srun", rank, size, address, port)


def first_host(nodelist: str) -> str:
    """``node[03-05,9],other`` -> ``node03``: the first host of a Slurm node list."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodelist)
    if match is None:
        raise UsageError(f"cannot read the Slurm node list {nodelist!r}; set MASTER_ADDR")
    return match.group(1) + (match.group(2) or "")


def _identity(
    env: Mapping[str, str], rank_name: str, size_name: str, launcher: str
) -> tuple[int, int]:
    rank = _integer(env, rank_name, launcher)
    size = _integer(env, size_name, launcher)
    if not 0 <= rank < size:
        raise UsageError(f"{rank_name}={rank} does not lie in 0..{size_name}-1 = 0..{size - 1}")
    return rank, size


def _needed(env: Mapping[str, str], name: str, launcher: str) -> str:
    if name not in env:
        raise UsageError(
            f"{name} is not set, although other variables of {launcher} are. Start all ranks with {launcher}, "
            f"or set {name}, or unset the others to run a single process"
        )
    return env[name]


def _integer(env: Mapping[str, str], name: str, launcher: str) -> int:
    text = _needed(env, name, launcher)
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name}={text!r} is not a whole number") from None

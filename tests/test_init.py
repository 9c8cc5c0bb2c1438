"""init(): every launcher, explicit stores, and what is said when something is missing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pyallreduce as par
from pyallreduce import rendezvous
from pyallreduce.launch import Launch, detect, first_host
from ranks import free_port_pair, run_ranks

HELLO = """
import sys, pyallreduce as par, torch
comm = par.init()
t = torch.tensor([1.0 + comm.rank])
comm.all_reduce(t)
where = f"{comm.size} {comm.local_size} {comm.node_rank} {comm.num_nodes}"
sys.stdout.write(f"sum {t.item()} size {where}\\n")  # one write: ranks share the pipe
sys.stdout.flush()
comm.close()
"""


def run_python(code: str, env: dict[str, str], *launcher: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYALLREDUCE_", "SLURM_"))}
    return subprocess.run(
        [*launcher, sys.executable, "-c", code],
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- who started us --------------------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, Launch("single")),
        (TORCHRUN, Launch("torchrun", 1, 2, "host", 29501)),
        (
            {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"},
            Launch("torchrun", 1, 2, "host", 29500, agent_store=True),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch("torchrun", 0, 1)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "2",
            },
            Launch("mpirun", 3, 4),
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, Launch("mpirun", 0, 2)),
        (
            {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "2"},
            Launch("srun", 2, 4, "127.0.0.1", 10217),
        ),
        (
            {
                "SLURM_PROCID": "2",
                "SLURM_NTASKS": "4",
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_ID": "1",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_STEP_NODELIST": "gpu[07-08]",
            },
            Launch("srun", 2, 4, "gpu07", 10218),
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "4294967291"},
            Launch("single"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Launch("single")),
    ],
)
def test_detects_the_launcher(env: dict[str, str], found: Launch) -> None:
    assert detect(env) == found


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_launcher_variable_is_named(missing: str) -> None:
    env = {k: v for k, v in TORCHRUN.items() if k != missing}
    with pytest.raises(par.UsageError, match=f"{missing} is not set"):
        detect(env)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"RANK": "2"}, "0..1"), ({"RANK": "x"}, "'x'"), ({"WORLD_SIZE": "0"}, "RANK=1")],
)
def test_a_senseless_launcher_variable_is_named(change: dict[str, str], words: str) -> None:
    with pytest.raises(par.UsageError, match=words):
        detect({**TORCHRUN, **change})


def test_the_users_port_wins() -> None:
    assert detect(TORCHRUN, 1234).port == 1234
    agent = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert detect(agent, 1234) == Launch("torchrun", 1, 2, "host", 1234)


def test_first_host_of_slurm_node_lists() -> None:
    lists = {"a": "a", "a,b": "a", "n[3-5]": "n3", "n[03,05]": "n03", "gpu-[1-2],cpu7": "gpu-1"}
    assert {text: first_host(text) for text in lists} == lists


# --- the launchers themselves ----------------------------------------------------------------------------------------


def test_a_single_process_needs_nothing() -> None:
    result = run_python(HELLO, {})
    assert result.stdout.split() == ["sum", "1.0", "size", "1", "1", "0", "1"], result.stderr


def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "hello.py"
    script.write_text(HELLO)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(script),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.stdout.count("sum 3.0 size 2 2 0 1") == 2, result.stdout + result.stderr


def test_mpirun() -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside python: pip install mpich")
    result = run_python(HELLO, {}, str(mpiexec), "-n", "3")
    assert result.stdout.count("sum 6.0 size 3 3 0 1") == 3, result.stdout + result.stderr


def test_mpirun_names_a_rank_0_that_does_not_come() -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside python: pip install mpich")
    code = """
import sys, pyallreduce as par
from mpi4py import MPI
if MPI.COMM_WORLD.Get_rank() == 1:
    try:
        par.init(timeout_s=0.5)
    except par.TimeoutError as error:
        sys.stdout.write(f"peers {error.peers}")
        sys.stdout.flush()
MPI.COMM_WORLD.Barrier()
"""
    result = run_python(code, {}, str(mpiexec), "-n", "2")
    assert result.stdout == "peers (0,)", result.stdout + result.stderr


def test_srun_environment() -> None:
    port = str(free_port_pair())
    common = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "PYALLREDUCE_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HELLO],
            env={**os.environ, **common, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == ["sum 3.0 size 2 2 0 1\n"] * 2


def init_before_and_after_a_process_group(rank: int, n: int) -> None:
    before = par.init()
    before.barrier()
    before.close()
    dist.init_process_group("gloo")
    after = par.init()
    t = torch.ones(1)
    after.all_reduce(t)
    dist.all_reduce(t)
    assert t.item() == n * n
    after.close()
    dist.destroy_process_group()


def test_both_orders_with_torch_distributed() -> None:
    run_ranks(2, init_before_and_after_a_process_group)


def process_group_without_environment(rank: int, n: int, path: str) -> None:
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        del os.environ[name]
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=n)
    comm = par.init()
    assert (comm.rank, comm.size) == (rank, n)
    comm.barrier()
    comm.close()
    dist.destroy_process_group()


def test_a_process_group_is_enough(tmp_path: Path) -> None:
    run_ranks(2, process_group_without_environment, str(tmp_path / "group"))


# --- explicit stores -------------------------------------------------------------------------------------------------


def subgroups(rank: int, n: int, path: str) -> None:
    store = dist.FileStore(path, n)
    world = par.init(store=store, rank=rank, size=n, timeout_s=20)
    second = par.init(store=store, rank=rank, size=n, timeout_s=20)  # any number over one store
    half = dist.PrefixStore(f"half {rank % 2}", store)
    mine = par.init(store=half, rank=rank // 2, size=n // 2, timeout_s=20)
    t = torch.tensor([float(rank)])
    mine.all_reduce(t)
    assert t.item() == sum(range(rank % 2, n, 2))
    for comm in (second, world):
        t = torch.tensor([float(rank)])
        comm.all_reduce(t)
        assert t.item() == sum(range(n))
    assert (mine.rank, mine.size) == (rank // 2, n // 2)
    for comm in (world, second, mine):
        comm.close()


def test_communicators_over_stores_and_subgroups(tmp_path: Path) -> None:
    run_ranks(4, subgroups, str(tmp_path / "store"))


def test_ranks_may_be_threads() -> None:
    store = dist.HashStore()
    sums: list[Any] = [None] * 3

    def body(rank: int) -> None:
        comm = par.init(store=store, rank=rank, size=3, timeout_s=20)
        t = comm.symmetric_empty(100_000).fill_(rank)
        comm.all_reduce(t)
        sums[rank] = t.unique().tolist()
        comm.close()

    threads = [threading.Thread(target=body, args=(r,)) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sums == [[3.0]] * 3


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(par.TimeoutError) as raised:
        par.init(store=dist.HashStore(), rank=1, size=4, timeout_s=0.3)
    assert raised.value.peers == (0, 2, 3)


def test_a_connection_with_itself_is_not_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gives a connection the very port that it asks for, once in thousands of tries."""
    connect = socket.create_connection
    port = free_port_pair()
    tries: list[socket.socket | dist.Store] = []

    def create_connection(address: tuple[str, int], timeout: float) -> socket.socket:
        if tries:
            tries.append(rendezvous.open_store(Launch("torchrun", 0, 2, port=port), 10))
            return connect(address, timeout)
        with_itself = connect(address, timeout, source_address=address)
        assert with_itself.getsockname() == with_itself.getpeername()
        tries.append(with_itself)
        return with_itself

    monkeypatch.setattr(socket, "create_connection", create_connection)
    store = rendezvous.open_store(Launch("torchrun", 1, 2, port=port), 10)
    store.set("key", "value")
    assert len(tries) == 2


@pytest.mark.parametrize(("rank", "size"), [(None, 2), (0, None), (2, 2), (-1, 2)])
def test_a_store_needs_rank_and_size(rank: int | None, size: int | None) -> None:
    with pytest.raises(par.UsageError, match="rank and size"):
        par.init(store=dist.HashStore(), rank=rank, size=size)


def pretend_two_hosts(rank: int, n: int) -> str:
    from pyallreduce import rendezvous

    rendezvous._node_key = lambda: f"host {rank // 2}"
    with pytest.raises(par.UsageError, match="different hosts") as raised:
        par.init()
    return str(raised.value)


def test_several_hosts_are_refused_for_now() -> None:
    assert "ranks 0 and 2" in run_ranks(3, pretend_two_hosts)[1]


# --- the environment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        (("PYALLREDUCE_TIMEOUT", "5"), ["unknown", "PYALLREDUCE_TIMEOUT_S"]),
        (("PYALLREDUCE_TIMEOUT_S", "soon"), ["soon", "number"]),
        (("PYALLREDUCE_PORT", "99999"), ["99999", "65535"]),
        (("PYALLREDUCE_ISA", "sse9"), ["sse9", "baseline"]),
    ],
)
def test_settings_are_checked(
    monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str], words: list[str]
) -> None:
    monkeypatch.setenv(*variable)
    with pytest.raises(par.UsageError) as raised:
        par.init()
    for word in words:
        assert word in str(raised.value)


def test_timeout_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYALLREDUCE_TIMEOUT_S", "7.5")
    comm = par.init()
    assert comm.timeout_s == 7.5
    comm.close()

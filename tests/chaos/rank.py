"""The program of a rank: a few iterations in which it stops at the case's moment, until an error ends them.

A rank stops inside the core by a trap: a page in the middle of its shard that it may not touch, and libc's usleep() as
handler of the segmentation fault, whose number it takes for 11 us; then the access is tried again. So the core stands
still between two elements of the reduction, in the code that users run, until the page is opened or the process ends.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import itertools
import json
import mmap
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import pyallreduce as par

from .cases import BUCKETS, FAULT_ITERATION, Case
from .kernel_view import holdings

BUCKET_ELEMS = 1 << 17
BUCKET_BYTES = 4 * BUCKET_ELEMS
# One turn of the core's staging slots, and our buckets' size: the middle of a rank's shard of it is also in the middle
# of its shard of a symmetric bucket, and no other access of a collective is to it but the reduction's.
REDUCED_BYTES = 512 << 10
PAGE_BYTES = mmap.PAGESIZE
MAX_ITERATIONS = 10
LARGE_BYTES = 200 << 20
LEARNING_RATE, MOMENTUM = 0.5, 0.5

_libc = ctypes.CDLL(None, use_errno=True)
_libc.signal.argtypes, _libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Struck(Exception):
    """The victim's own, which nobody catches."""


class Leave(Exception):
    """Ends an iteration in the middle, to close the communicator there."""


# --- what rank and director share ------------------------------------------------------------------------------------


class Board:
    """Shared memory: where each rank stands, and when it was struck, in seconds of time.monotonic()."""

    RUNNING, AT_GATE, CLOSING = range(3)
    _LINE = struct.Struct("=q?xxxxxxxd")

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size * self._LINE.size)

    def state(self, rank: int) -> int:
        return self._read(rank)[0]

    def trap_is_set(self, rank: int) -> bool:
        return self._read(rank)[1]

    def struck_s(self, rank: int) -> float:
        """0 while it was not."""
        return self._read(rank)[2]

    def set_state(self, rank: int, state: int) -> None:
        self._write(rank, state, self.trap_is_set(rank), self.struck_s(rank))

    def set_trap(self, rank: int) -> None:
        self._write(rank, self.state(rank), True, self.struck_s(rank))

    def strike(self, rank: int) -> None:
        self._write(rank, self.state(rank), self.trap_is_set(rank), time.monotonic())

    def _read(self, rank: int) -> tuple[int, bool, float]:
        return self._LINE.unpack_from(self._memory, rank * self._LINE.size)

    def _write(self, rank: int, *line: int | bool | float) -> None:
        self._LINE.pack_into(self._memory, rank * self._LINE.size, *line)


class Actor:
    """Stops this rank at the moment of the case, if it plays a part in it, and obeys the director."""

    def __init__(self, case: Case, rank: int, board: Board, gate: int, orders: int) -> None:
        self.case, self.rank = case, rank
        self.is_victim, self.is_other = rank == case.victim, rank == case.other
        self.iteration = -1  # not begun
        self._board, self._gate, self._orders = board, gate, orders
        self._page = 0
        self._limited: tuple[int, tuple[int, int]] | None = None
        signal.signal(signal.SIGUSR1, self._raise)
        threading.Thread(target=self._obey, name="orders", daemon=True).start()

    def before_first(self) -> None:
        if self.case.moment == "before_first" and (self.is_victim or not self.case.survivors_wait):
            self._wait_at_gate()

    def before(self, bucket: int, flat: Tensor) -> None:
        """The rank is about to submit this bucket."""
        if not self._is_time(bucket):
            return
        moment = self.case.moment
        if moment == "waiting_for_peers" and self.is_other:
            self._wait_at_gate()
        if (moment in ("in_reduction", "in_close") and self.is_victim) or (
            moment == "waiting_for_end" and self.is_other
        ):
            self._set_trap(flat)

    def after(self, bucket: int) -> None:
        """It has submitted it."""
        if not self._is_time(bucket) or not self.is_victim:
            return
        if self.case.moment == "between_buckets":
            self._wait_at_gate()
        if self.case.moment == "in_close":
            self._wait_at_gate()  # until the worker is in the trap: close() ends waits for peers
            raise Leave

    def closing(self) -> None:
        self._board.set_state(self.rank, Board.CLOSING)

    def _is_time(self, bucket: int) -> bool:
        return (self.iteration, bucket) == (FAULT_ITERATION, self.case.bucket)

    def _wait_at_gate(self) -> None:
        if self.case.fault == "allocation":  # which strikes in the course of the program
            return
        self._board.set_state(self.rank, Board.AT_GATE)
        os.read(self._gate, 1)

    def _set_trap(self, flat: Tensor) -> None:
        assert flat.nbytes >= REDUCED_BYTES
        middle = flat.data_ptr() + int((self.rank + 0.5) / self.case.size * REDUCED_BYTES)
        self._page = middle - middle % PAGE_BYTES
        _libc.signal(signal.SIGSEGV, ctypes.cast(_libc.usleep, ctypes.c_void_p))
        assert _libc.mprotect(self._page, PAGE_BYTES, 0) == 0
        self._board.set_trap(self.rank)

    def _open_trap(self) -> None:
        page, self._page = self._page, 0
        if page:
            _libc.mprotect(page, PAGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE)

    def _obey(self) -> None:
        while order := os.read(self._orders, 1):
            if order == b"o":
                self._open_trap()
            if order == b"x":
                self._board.strike(self.rank)
                os._exit(0)

    def _raise(self, number: int, frame: Any) -> NoReturn:
        self._board.strike(self.rank)
        self._open_trap()  # the main thread, and so close(), waits for the thread in it
        if self.case.fault == "exit":
            sys.exit(0)
        raise Struck

    def limit_resources(self) -> None:
        """From now on this process gets no shared memory."""
        if self.case.fault != "allocation" or not self.is_victim or self._limited:
            return
        kind, value = {
            "file_size": lambda: (resource.RLIMIT_FSIZE, PAGE_BYTES),
            "descriptors": lambda: (resource.RLIMIT_NOFILE, lowest_free_descriptor()),
            "address_space": lambda: (resource.RLIMIT_AS, address_space_bytes() + (1 << 20)),
        }[self.case.limit]()
        self._limited = kind, resource.getrlimit(kind)
        resource.setrlimit(kind, (value, self._limited[1][1]))
        self._board.strike(self.rank)

    def unlimit_resources(self) -> None:
        if self._limited is not None:
            resource.setrlimit(*self._limited)


def lowest_free_descriptor() -> int:
    descriptor = os.open("/dev/null", os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def address_space_bytes(steady_s: float = 0.1, patience_s: float = 2.0) -> int:
    """Once threads that are about to end have given their stacks back: those would be room beyond the limit."""
    give_up_at = time.monotonic() + patience_s
    size, since_s = 0, time.monotonic()
    while (now_s := time.monotonic()) < min(since_s + steady_s, give_up_at):
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        if pages * PAGE_BYTES != size:
            size, since_s = pages * PAGE_BYTES, now_s
        time.sleep(0.005)
    return size


# --- what it does meanwhile ------------------------------------------------------------------------------------------


class Ones(Dataset):
    """A sample is what each gradient element of this rank will be."""

    def __init__(self, rank: int) -> None:
        self._value = float(rank + 1)

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> float:
        return self._value


def only(batch: list[float]) -> float:
    return batch[0]


def weight_after(steps: int, size: int) -> float:
    """Of every element: all operations are exact in float32."""
    weight, velocity, gradient = 1.0, 0.0, (size + 1) / 2
    for _ in range(steps):
        velocity = MOMENTUM * velocity + gradient
        weight -= LEARNING_RATE * velocity
    return weight


class Layers(nn.Module):
    """The gradient of every element is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.ones(BUCKET_ELEMS)) for _ in range(BUCKETS + 2)
        )

    def forward(self, value: float) -> Tensor:
        return torch.stack([(weight * value).sum() for weight in self.weights]).sum()


class Collectives:
    """The communicator by itself."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def attach(self, comm: par.Communicator) -> None:
        self.comm, actor = comm, self._actor
        make = comm.symmetric_empty if actor.case.is_symmetric else torch.empty
        if actor.case.fault == "allocation" and actor.case.moment == "waiting_for_peers":
            make = comm.symmetric_empty
        self._tensors = [make(BUCKET_ELEMS) for _ in range(BUCKETS + 1)]

    def iterate(self, value: float) -> None:
        works = []
        for bucket, tensor in enumerate(self._tensors):
            tensor.fill_(value)
            self._actor.before(bucket, tensor)
            works.append(self.comm.all_reduce(tensor, async_op=self._actor.case.is_async))
            self._actor.after(bucket)
        size = self.comm.size
        for work, tensor in zip(works, self._tensors, strict=True):
            if work is not None:
                work.wait()
            assert (tensor == size * (size + 1) / 2).all()

    def again(self) -> None:
        self.comm.all_reduce(torch.ones(1))

    def weights(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class Trained:
    """A model whose gradients one of the library's ways aggregates."""

    def __init__(self, actor: Actor, optimizer: type = par.SGD) -> None:
        self._actor = actor
        self.model = Layers()
        self.optimizer = optimizer(
            self.model.parameters(),
            lr=LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=0.0,
            nesterov=False,
        )
        self._steps = 0

    def iterate(self, value: float) -> None:
        self.backward(value)
        self.optimizer.step()
        self._steps += 1
        self.optimizer.zero_grad(set_to_none=self._actor.case.set_to_none)

    def backward(self, value: float) -> None:
        self.model(value).backward()

    def again(self) -> None:
        self.backward(1.0)

    def weights(self) -> dict[str, Any]:
        """Are they those of before or after the iteration, everywhere?"""
        before, after = (weight_after(self._steps + k, self._actor.case.size) for k in (0, 1))
        parts = [weight.detach() for weight in self.model.parameters()]
        are = {
            name: all(bool((part == value).all()) for part in parts)
            for name, value in (("before", before), ("after", after))
        }
        strange = any(bool(((part != before) & (part != after)).any()) for part in parts)
        return {"weights": next((name for name in are if are[name]), "mixed"), "strange": strange}

    def close(self) -> None:
        pass


class Watched(par.GradientAggregator):
    """An aggregator that lets the actor in around each bucket's submission."""

    def __init__(self, actor: Actor, *args: Any, **options: Any) -> None:
        self._actor = actor
        super().__init__(*args, bucket_bytes=BUCKET_BYTES, **options)

    def _start(self, bucket: Any) -> None:
        self._actor.before(bucket.index, bucket.flat)
        super()._start(bucket)
        self._actor.after(bucket.index)


class Aggregated(Trained):
    def attach(self, comm: par.Communicator) -> None:
        self._aggregator = Watched(
            self._actor, self.model, comm, optimizer=self.optimizer, update=self._actor.case.surface
        )

    def weights(self) -> dict[str, Any]:
        return {**super().weights(), "torn": self._aggregator.torn}

    def close(self) -> None:
        self._aggregator.close()


class InDDP(Trained):
    def __init__(self, actor: Actor) -> None:
        super().__init__(actor, torch.optim.SGD)
        # Before any fault: its constructor communicates by Gloo.
        self._ddp = DistributedDataParallel(self.model, bucket_cap_mb=BUCKET_BYTES / (1 << 20))

    def attach(self, comm: par.Communicator) -> None:
        self._comm, actor = comm, self._actor

        def hook(state, bucket):  # DDP does not understand postponed annotations
            actor.before(bucket.index(), bucket.buffer())
            future = par.allreduce_hook(state, bucket)
            actor.after(bucket.index())
            return future

        self._ddp.register_comm_hook(comm, hook)

    def backward(self, value: float) -> None:
        self._ddp(value).backward()

    def again(self) -> None:
        """Not another backward: DDP refuses one after any error, with one of its own."""
        self._comm.all_reduce(torch.ones(1))


SURFACES = {
    "communicator": Collectives,
    "step": Aggregated,
    "eager": Aggregated,
    "ddp": InDDP,
}


# --- from start to end -----------------------------------------------------------------------------------------------


def attempt(call: Callable[[], None]) -> dict[str, Any] | None:
    """What it raised, without what a traceback keeps alive."""
    called_s = time.monotonic()
    try:
        call()
    except Exception as error:
        if isinstance(error, (Struck, Leave)):
            raise
        ended_s = time.monotonic()
        return {
            "type": type(error).__name__,
            "peers": list(getattr(error, "peers", ())),
            "message": str(error),
            "called_s": called_s,
            "ended_s": ended_s,
        }
    return None


def run_rank(case: Case, rank: int, board: Board, gate: int, orders: int, results: int) -> None:
    """In a process of its own; the interpreter shuts down after it, as a user's does."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # the director's, when time is over
    actor = Actor(case, rank, board, gate, orders)
    if case.surface == "ddp":
        dist.init_process_group("gloo")
    par.init().close()  # the short deadline is not for the start of the processes
    before = holdings()
    record = live(case, actor)
    # PyTorch keeps what is left of a backward that has raised until the next one of the same thread.
    torch.ones(1, requires_grad=True).sum().backward()
    gc.collect()
    record["holdings_before"], record["holdings_after"] = before, settled_holdings(before)
    os.write(results, json.dumps(record).encode())
    os.close(results)
    if case.ends_at_once and not actor.is_victim:
        os._exit(0)
    if case.surface == "ddp":
        dist.destroy_process_group()


def live(case: Case, actor: Actor) -> dict[str, Any]:
    large = b"\1" * LARGE_BYTES if case.fault == "out_of_memory" and actor.is_victim else b""
    surface = SURFACES[case.surface](actor)
    comm: par.Communicator | None = None
    attached = False

    def run() -> None:
        nonlocal comm, attached
        if case.moment == "before_first":
            actor.limit_resources()
        comm = par.init(timeout_s=case.timeout_s)
        values: Iterator[float] = iter(
            DataLoader(Ones(actor.rank), num_workers=case.workers, collate_fn=only)
        )
        for _ in range(case.workers):
            next(values)  # a worker looks for its parent only once it has begun to work
        actor.before_first()
        actor.limit_resources()
        surface.attach(comm)
        attached = True
        for actor.iteration, value in zip(range(MAX_ITERATIONS), values, strict=False):
            surface.iterate(value)

    record: dict[str, Any] = {"closed": False}
    try:
        record["error"] = attempt(run)
    except Leave:
        actor.closing()
        comm.close()
        record["closed"] = True
    actor.iteration = -1  # the moment is over
    if comm is not None:
        record["again"] = attempt(surface.again if attached else comm.barrier)
    if attached:
        record.update(surface.weights())
        surface.close()
    actor.unlimit_resources()
    closing_s = time.monotonic()
    if comm is not None:
        comm.close()
    record["close_s"] = time.monotonic() - closing_s
    del large
    return record


def settled_holdings(before: dict[str, int], patience_s: float = 2.0) -> dict[str, int]:
    """Now, or as soon as threads that have been told to end have done so."""
    give_up_at = time.monotonic() + patience_s
    for pause_ms in itertools.count(1):
        now = holdings()
        if all(now[name] <= before[name] for name in now) or time.monotonic() > give_up_at:
            return now
        gc.collect()
        time.sleep(1e-3 * pause_ms)
    raise AssertionError

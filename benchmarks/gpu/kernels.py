"""The CUDA kernels against copy bandwidth and against torch, on one GPU: one JSON object per line.

    python benchmarks/gpu/kernels.py             # about a minute on an H200
    python benchmarks/gpu/kernels.py --sweep     # also chunk sizes and grids of the update
    python benchmarks/gpu/kernels.py --dry-run   # every line of this file on a CPU, by the kernels' twin; no figures

Each repetition: inputs are put back, the L2 cache is flushed by reading another buffer (writing one would leave its
write-backs to the measured kernel), the GPU is kept busy until the host has queued the whole method, and events around
it give the time. The result of the last timed repetition is compared with float64 arithmetic. Copy bandwidth is the
best of our kernel and torch's, over a large buffer and over one of the update's size, since the last tens of MB that a
kernel writes may still be in the L2 cache when it ends. Bytes are those that must move: each input read once, each
output written once. Exit code 1: a result was wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from pyallreduce import _core

MIB = 1 << 20
LINE_BYTES = 64  # parameters begin on cache lines, as in the aggregator's buckets
BUCKET_BYTES = 25 * MIB
LR, MOMENTUM, DECAY, WORLD = 0.1, 0.9, 1e-4, 8

State = dict[str, torch.Tensor]  # what a method reads and writes, each flat


def resnet50_sizes() -> list[int]:
    """Elements of ResNet-50's 161 parameters, in order of registration."""
    sizes = [64 * 3 * 49, 64, 64]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outputs = 4 * width
            convolutions = [(inputs, width, 1), (width, width, 9), (width, outputs, 1)]
            if block == 0:
                convolutions.append((inputs, outputs, 1))
            for fan_in, fan_out, window in convolutions:
                sizes += [fan_in * fan_out * window, fan_out, fan_out]
            inputs = outputs
    return [*sizes, 2048 * 1000, 1000]


# ---- the machine ----


@dataclass
class Machine:
    is_dry: bool
    sizes: list[int]  # of the parameters
    copy_bytes: int
    flush: torch.Tensor
    repeats: int
    kernels: type[_core.cuda_twin]
    max_blocks: int = 0

    @property
    def device(self) -> str:
        return "cpu" if self.is_dry else "cuda"

    @property
    def name(self) -> str:
        return "twin on the CPU" if self.is_dry else torch.cuda.get_device_name()

    def stream(self) -> int:
        return 0 if self.is_dry else torch.cuda.current_stream().cuda_stream

    def image(self, table: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(table.image()), dtype=torch.uint8).clone().to(self.device)

    def random(self, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(count, device=self.device).to(dtype)


def this_gpu() -> Machine:
    flush = torch.randn(64 * MIB, device="cuda")  # 256 MiB, five times the L2 cache of an H200
    return Machine(False, resnet50_sizes(), 2048 * MIB, flush, 60, _core.cuda)


def dry_run() -> Machine:
    return Machine(True, [300, 8, 1, 5000, 0, 33], 4096, torch.randn(1024), 3, _core.cuda_twin)


# ---- measuring ----


@dataclass
class Method:
    """One way to do the work of a case. ``state``: called when it is needed, since optimizers make theirs in the first
    step; ``expected``: the state after ``run``, from the one before, in float64."""

    name: str
    num_bytes: int
    run: Callable[[], None]
    state: Callable[[], State]
    expected: Callable[[State], State]
    restore: Callable[[], None] = lambda: None
    tolerance: float = 1e-6
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Timing:
    gpu_us: list[float]
    host_us: list[float]
    error: float


def timed(machine: Machine, method: Method, busy_cycles: int) -> tuple[float, float]:
    """Microseconds on the GPU and of the host's call."""
    method.restore()
    machine.flush.sum()
    if machine.is_dry:
        begin = time.perf_counter()
        method.run()
        elapsed = (time.perf_counter() - begin) * 1e6
        return elapsed, elapsed
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    torch.cuda._sleep(busy_cycles)
    start.record()
    begin = time.perf_counter()
    method.run()
    host_us = (time.perf_counter() - begin) * 1e6
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3, host_us


def measure(machine: Machine, method: Method) -> Timing:
    busy_cycles = 10_000_000  # 5 ms at 2 GHz
    warm = [timed(machine, method, busy_cycles)[1] for _ in range(5)]
    busy_cycles = int(2000 * (3 * statistics.median(warm) + 200))
    samples = [timed(machine, method, busy_cycles) for _ in range(machine.repeats - 1)]
    method.restore()
    before = {name: flat.clone() for name, flat in method.state().items()}
    samples.append(timed(machine, method, busy_cycles))
    error = error_of(method.state(), method.expected(before))
    gpu_us, host_us = (list(column) for column in zip(*samples, strict=True))
    return Timing(gpu_us, host_us, error)


def error_of(state: State, expected: State) -> float:
    """The largest relative error, in the 2-norm, of any of the tensors; what should be zero must be."""
    worst = 0.0
    for name, want in expected.items():
        difference = float((state[name].double() - want).norm())
        norm = float(want.norm())
        error = difference / norm if norm else (0.0 if difference == 0 else float("inf"))
        worst = error if error != error else max(worst, error)  # NaN stays
        if worst != worst:
            break
    return worst


class Book:
    """Prints each result, and remembers it for the ratios."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._medians: dict[tuple[str, str], float] = {}
        self._gb_per_s: dict[tuple[str, str], float] = {}
        self.copy_gb_per_s = 0.0
        self.all_right = True

    def measure(self, case: str, method: Method) -> None:
        timing = measure(self._machine, method)
        median = statistics.median(timing.gpu_us)
        deciles = statistics.quantiles(timing.gpu_us, n=10)
        gb_per_s = method.num_bytes / median * 1e-3
        if case == "copy":
            self.copy_gb_per_s = max(self.copy_gb_per_s, gb_per_s)
        verified = timing.error <= method.tolerance
        self.all_right &= verified
        self._medians[case, method.name] = median
        self._gb_per_s[case, method.name] = gb_per_s
        self.print(
            case=case,
            method=method.name,
            bytes=method.num_bytes,
            median_us=round(median, 3),
            p10_us=round(deciles[0], 3),
            p90_us=round(deciles[-1], 3),
            min_us=round(min(timing.gpu_us), 3),
            host_us=round(statistics.median(timing.host_us), 3),
            repeats=len(timing.gpu_us),
            gb_per_s=round(gb_per_s, 1),
            of_copy=round(gb_per_s / self.copy_gb_per_s, 4),
            error=timing.error,
            tolerance=method.tolerance,
            verified=verified,
            **method.settings,
        )

    def print(self, **fields: Any) -> None:
        print(json.dumps({"bench": "gpu-kernels", **fields}), flush=True)

    def bar(self, what: str, value: float, limit: float) -> None:
        met = None if self._machine.is_dry else value >= limit
        self.print(bar=what, value=round(value, 4), at_least=limit, met=met)

    def of_copy(self, case: str, method: str) -> float:
        return self._gb_per_s[case, method] / self.copy_gb_per_s

    def speedup(self, case: str, method: str, other: str) -> float:
        return self._medians[case, other] / self._medians[case, method]


# ---- the cases ----


def copies(machine: Machine, num_bytes: int) -> Iterator[Method]:
    source = machine.random(num_bytes // 4)
    target = torch.empty_like(source)
    for name, run in {
        "ours": lambda: machine.kernels.copy(
            source.data_ptr(), target.data_ptr(), num_bytes, stream=machine.stream()
        ),
        "torch copy_": lambda: target.copy_(source),
    }.items():
        yield Method(
            f"{name}, {num_bytes >> 20} MiB", 2 * num_bytes, run, lambda: {"target": target},
            lambda _: {"target": source.double()}, restore=target.zero_, tolerance=0,
        )  # fmt: skip


@dataclass
class Parameters:
    """Flat buffers of one layout, and the slots of the parameters in them."""

    machine: Machine
    gradient_dtype: torch.dtype = torch.float32
    begins: list[int] = field(init=False)

    def __post_init__(self) -> None:
        line = LINE_BYTES // self.gradient_dtype.itemsize
        self.begins, end = [], 0
        for size in self.machine.sizes:
            self.begins.append(end)
            end += (size + line - 1) // line * line
        self.weights, self.momentum = (self.machine.random(end) for _ in "wm")
        self.source = self.machine.random(end, self.gradient_dtype)  # of the gradients
        self.gradients = self.source.clone()
        self.copies = self.weights.to(torch.bfloat16)

    @property
    def num_elems(self) -> int:
        return sum(self.machine.sizes)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [
            flat[begin : begin + size]
            for begin, size in zip(self.begins, self.machine.sizes, strict=True)
        ]

    def only_parameters(self, flat: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.views(flat))

    def restore_gradients(self) -> None:
        self.gradients.copy_(self.source)

    def buckets(self, max_bytes: int) -> list[list[int]]:
        """Indices of parameters."""
        buckets: list[list[int]] = [[]]
        filled = 0
        for i, size in enumerate(self.machine.sizes):
            if buckets[-1] and filled + size * 4 > max_bytes:
                buckets.append([])
                filled = 0
            buckets[-1].append(i)
            filled += size * 4
        return buckets

    def table(self, which: list[int], has_copies: bool, chunk_elems: int = 0) -> Any:
        short = self.gradient_dtype.itemsize
        pieces = [
            (
                self.begins[i] * 4,
                self.begins[i] * 4,
                self.begins[i] * short,
                self.begins[i] * 2 if has_copies else None,
                self.machine.sizes[i],
                0,
            )
            for i in which
        ]
        dtype = str(self.gradient_dtype).removeprefix("torch.")
        return _core.kernels.UpdateTable(dtype, "float32", pieces, chunk_elems)


def rule(nesterov: bool) -> Any:
    return _core.kernels.UpdateRule(
        _core.kernels.SgdScalars(
            decay=DECAY, history=MOMENTUM, gain=1.0, momentum=MOMENTUM, rate=LR, nesterov=nesterov
        )
    )


def stepped(before: State, scale: float, nesterov: bool = False) -> State:
    """One SGD step in float64."""
    weight, momentum, gradient = (before[name].double() for name in ("w", "m", "g"))
    gradient = scale * gradient + DECAY * weight
    momentum = MOMENTUM * momentum + gradient
    step = gradient + MOMENTUM * momentum if nesterov else momentum
    return {"w": weight - LR * step, "m": momentum}


def update_by_ours(
    parameters: Parameters,
    name: str,
    *,
    max_bytes: int = 1 << 62,
    nesterov: bool = False,
    scale: float = 1.0,
    zero: bool = False,
    has_copies: bool = False,
    finds: bool = False,
    chunk_elems: int = 0,
) -> Method:
    machine, p = parameters.machine, parameters
    tables = [p.table(which, has_copies, chunk_elems) for which in p.buckets(max_bytes)]
    images = [machine.image(table) for table in tables]
    rules = [rule(nesterov)]
    total = torch.zeros(1, dtype=torch.float64, device=machine.device)

    def run() -> None:
        for table, image in zip(tables, images, strict=True):
            machine.kernels.update(
                table, image.data_ptr(), rules, weights=p.weights.data_ptr(),
                momentum=p.momentum.data_ptr(), gradients=p.gradients.data_ptr(),
                copies=p.copies.data_ptr(), scale=scale, zero_gradients=zero,
                sum_squares=total.data_ptr() if finds else 0, stream=machine.stream(),
                max_blocks=machine.max_blocks,
            )  # fmt: skip

    def state() -> State:
        flats = {"w": p.weights, "m": p.momentum, "g": p.gradients, "c": p.copies}
        return {key: p.only_parameters(flat) for key, flat in flats.items()} | {"n": total}

    def expected(before: State) -> State:
        result = stepped(before, scale, nesterov)
        if zero:
            result["g"] = torch.zeros_like(before["g"], dtype=torch.float64)
        if has_copies:
            result["c"] = state()["w"].to(torch.bfloat16).double()  # exactly: of the new weights
        if finds:
            result["n"] = before["n"] + (scale * before["g"].double()).square().sum()
        return result

    short = p.gradient_dtype.itemsize
    bytes_per_element = 16 + short * (2 if zero else 1) + (2 if has_copies else 0)
    return Method(
        name, bytes_per_element * p.num_elems, run, state, expected, p.restore_gradients,
        settings={"launches": len(tables), "chunks": sum(table.num_chunks for table in tables)},
    )  # fmt: skip


@dataclass
class TorchSgd:
    """torch.optim.SGD over parameters of their own; ``reduced``: the buffer that a collective has left."""

    p: Parameters
    kind: str  # "fused" or "foreach"
    nesterov: bool = False
    views: bool = (
        False  # gradients are views of the reduced buffer, as DDP's gradient_as_bucket_view
    )

    def __post_init__(self) -> None:
        self.params = [torch.nn.Parameter(w.clone()) for w in self.p.views(self.p.weights)]
        self.reduced = self.p.source.clone()
        self.grads = self.p.views(self.reduced)
        if not self.views:
            self.grads = [grad.clone() for grad in self.grads]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        self.optimizer = torch.optim.SGD(
            self.params, LR, MOMENTUM, weight_decay=DECAY, nesterov=self.nesterov,
            **{self.kind: True},
        )  # fmt: skip
        self.optimizer.step()  # makes the momentum

    def restore(self) -> None:
        self.reduced.copy_(self.p.source)

    def state(self) -> State:
        momentum = [self.optimizer.state[param]["momentum_buffer"] for param in self.params]
        return {
            "w": torch.cat([param.detach() for param in self.params]),
            "m": torch.cat(momentum),
            "g": self.p.only_parameters(self.reduced),
            "p.grad": torch.cat(self.grads),
        }

    def update(self, name: str, bytes_per_element: int) -> Method:
        return Method(
            name, bytes_per_element * self.p.num_elems, self.optimizer.step, self.state,
            lambda before: stepped(before, 1.0, self.nesterov),
        )  # fmt: skip

    def whole_step(self, name: str, bytes_per_element: int) -> Method:
        """Scale, unpack unless gradients are views, update, zero."""
        slots = self.p.views(self.reduced)

        def run() -> None:
            self.reduced.mul_(1 / WORLD)
            if not self.views:
                torch._foreach_copy_(self.grads, slots)
            self.optimizer.step()
            if self.views:
                self.reduced.zero_()
            else:
                torch._foreach_zero_(self.grads)

        def expected(before: State) -> State:
            zero = torch.zeros_like(before["g"], dtype=torch.float64)
            return {**stepped(before, 1 / WORLD), "p.grad": zero}

        return Method(
            name, bytes_per_element * self.p.num_elems, run, self.state, expected, self.restore
        )


def casts(machine: Machine) -> Iterator[Method]:
    """Many tensors to one flat buffer and back."""
    tensors = [machine.random(size) for size in machine.sizes]
    count = sum(machine.sizes)

    def cast(
        name: str, source: str, target: str, line_bytes: int, unpacks: bool, scale: float
    ) -> Method:
        from_dtype, to_dtype = getattr(torch, source), getattr(torch, target)
        flat_dtype, own_dtype = (from_dtype, to_dtype) if unpacks else (to_dtype, from_dtype)
        line = line_bytes // flat_dtype.itemsize
        begins, end = [], 0
        for size in machine.sizes:
            begins.append(end)
            end += (size + line - 1) // line * line
        flat = machine.random(end, flat_dtype)
        own = [tensor.to(own_dtype, copy=True) for tensor in tensors]
        spans = []
        for tensor, begin in zip(own, begins, strict=True):
            ends = (tensor.data_ptr(), begin * flat_dtype.itemsize)
            spans.append((*(ends[::-1] if unpacks else ends), tensor.numel()))
        table = _core.kernels.SpanTable(source, target, spans)
        image = machine.image(table)
        bases = {"sources" if unpacks else "destinations": flat.data_ptr()}

        def packed() -> torch.Tensor:
            slots = zip(begins, machine.sizes, strict=True)
            return torch.cat([flat[begin : begin + size] for begin, size in slots])

        def state() -> State:
            return {"in": packed(), "out": torch.cat(own)} if unpacks else {
                "in": torch.cat(own), "out": packed()
            }  # fmt: skip

        def run() -> None:
            machine.kernels.cast(
                table, image.data_ptr(), scale=scale, stream=machine.stream(),
                max_blocks=machine.max_blocks, **bases,
            )  # fmt: skip

        def poison() -> None:
            if unpacks:
                torch._foreach_zero_(own)
            else:
                flat.zero_()

        return Method(
            name, (from_dtype.itemsize + to_dtype.itemsize) * count, run, state,
            lambda before: {"out": scale * before["in"].double()}, poison,
            tolerance=1e-6 if target == "float32" else 4e-3,
            settings={"chunks": table.num_chunks},
        )  # fmt: skip

    scale = 1 / WORLD
    yield cast("pack float32", "float32", "float32", LINE_BYTES, False, 1.0)
    yield cast("pack float32 to bfloat16", "float32", "bfloat16", LINE_BYTES, False, scale)
    yield cast("pack float32 to float16", "float32", "float16", LINE_BYTES, False, scale)
    yield cast("unpack float32", "float32", "float32", LINE_BYTES, True, scale)
    yield cast("unpack bfloat16 to float32", "bfloat16", "float32", LINE_BYTES, True, scale)
    yield cast("pack float32 without gaps", "float32", "float32", 4, False, 1.0)


def scale_and_reduce(machine: Machine) -> Iterator[Method]:
    count = sum(machine.sizes)
    flats = [machine.random(count) for _ in range(4)]
    first = flats[0].clone()

    def method(name: str, num_sources: int, scale: float) -> Method:
        sources = [flat.data_ptr() for flat in flats[:num_sources]]

        def run() -> None:
            machine.kernels.reduce(
                sources, sources[:1], count, "float32", scale, stream=machine.stream(),
                max_blocks=machine.max_blocks,
            )  # fmt: skip

        def expected(before: State) -> State:
            total = before["0"].double()
            for other in flats[1:num_sources]:
                total = total + other.double()
            return {"0": scale * total}

        return Method(
            name, 4 * (num_sources + 1) * count, run, lambda: {"0": flats[0]}, expected,
            restore=lambda: flats[0].copy_(first),
        )  # fmt: skip

    yield method("scale in place", 1, 1 / WORLD)
    yield method("sum of 4", 4, 1 / WORLD)


def inspection(parameters: Parameters) -> Method:
    machine, p = parameters.machine, parameters
    table = p.table(list(range(len(machine.sizes))), has_copies=False)
    image = machine.image(table)
    total = torch.zeros(1, dtype=torch.float64, device=machine.device)

    def run() -> None:
        machine.kernels.inspect(
            table, image.data_ptr(), gradients=p.gradients.data_ptr(),
            sum_squares=total.data_ptr(), stream=machine.stream(),
        )  # fmt: skip

    def expected(_: State) -> State:
        return {"n": p.only_parameters(p.gradients).double().square().sum()[None]}

    return Method("ours", 4 * p.num_elems, run, lambda: {"n": total}, expected, restore=total.zero_)


# ---- the whole ----


def run_all(machine: Machine, book: Book) -> None:
    total_bytes = 20 * sum(machine.sizes)
    for num_bytes in (machine.copy_bytes, total_bytes // 2 // 16 * 16):
        for method in copies(machine, num_bytes):
            book.measure("copy", method)

    p = Parameters(machine)
    for nesterov in (False, True):
        case = "update, nesterov" if nesterov else "update"
        book.measure(case, update_by_ours(p, "ours", nesterov=nesterov))
        book.measure(case, TorchSgd(p, "fused", nesterov).update("torch fused", 20))
        book.measure(case, TorchSgd(p, "foreach", nesterov).update("torch foreach", 20))
    book.measure("update", update_by_ours(p, "ours, buckets of 25 MiB", max_bytes=BUCKET_BYTES))
    book.measure("update", update_by_ours(p, "ours, with its sum of squares", finds=True))

    case = "scale, unpack, update, zero"
    ours = {"scale": 1 / WORLD, "zero": True}
    book.measure(case, update_by_ours(p, "ours", **ours))
    book.measure(case, update_by_ours(p, "ours, buckets of 25 MiB", max_bytes=BUCKET_BYTES, **ours))
    book.measure(case, TorchSgd(p, "fused").whole_step("torch fused", 24))
    book.measure(case, TorchSgd(p, "fused", views=True).whole_step("torch fused, bucket views", 24))
    book.measure("inspect", inspection(p))

    half = Parameters(machine, torch.bfloat16)
    case = "update, bfloat16 gradients and copy"
    book.measure(case, update_by_ours(half, "ours", has_copies=True))
    book.measure(case, update_by_ours(half, "ours, zeroing", has_copies=True, zero=True))

    elementwise = [*casts(machine), *scale_and_reduce(machine)]
    for method in elementwise:
        book.measure("elementwise", method)

    report_bars(book, [m.name for m in elementwise if "without gaps" not in m.name])


def report_bars(book: Book, elementwise: list[str]) -> None:
    case = "update"
    book.bar("update / copy bandwidth", book.of_copy(case, "ours"), 0.90)
    book.bar("update: torch fused / ours", book.speedup(case, "ours", "torch fused"), 1.0)
    book.bar("update: torch foreach / ours", book.speedup(case, "ours", "torch foreach"), 2.0)
    case = "scale, unpack, update, zero"
    book.bar(f"{case}: torch fused / ours", book.speedup(case, "ours", "torch fused"), 1.3)
    case = "update, bfloat16 gradients and copy"
    book.bar(f"{case} / copy bandwidth", book.of_copy(case, "ours"), 0.85)
    for name in elementwise:
        book.bar(f"{name} / copy bandwidth", book.of_copy("elementwise", name), 0.85)


def sweep(machine: Machine, book: Book) -> None:
    """What kChunkBytes and the grid are chosen by."""
    p = Parameters(machine)
    processors = 1
    if not machine.is_dry:
        processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    for chunk_elems in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        for blocks in (0, 2, 4, 6, 8, 16, 64):  # per multiprocessor; 0: as many as it holds
            machine.max_blocks = blocks * processors
            method = update_by_ours(p, f"{chunk_elems} x {blocks}", chunk_elems=chunk_elems)
            method.settings |= {"chunk_elems": chunk_elems, "blocks_per_processor": blocks}
            book.measure("sweep of the update", method)
    machine.max_blocks = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, by the twin")
    parser.add_argument("--sweep", action="store_true", help="chunk sizes and grids of the update")
    arguments = parser.parse_args()
    if not arguments.dry_run and not (_core.has_cuda and torch.cuda.is_available()):
        print(
            "needs a GPU and an extension built with CUDA; --dry-run needs neither", file=sys.stderr
        )
        return 2
    torch.manual_seed(0)
    machine = dry_run() if arguments.dry_run else this_gpu()
    book = Book(machine)
    book.print(
        device=machine.name,
        dry_run=machine.is_dry,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        parameters=len(machine.sizes),
        elements=sum(machine.sizes),
    )
    run_all(machine, book)
    if arguments.sweep:
        sweep(machine, book)
    return 0 if book.all_right else 1


if __name__ == "__main__":
    sys.exit(main())

"""The CUDA kernels through their bindings: on the host by their twin, the same source, and on a GPU where there is one.

tests/cpp/cuda_twin.cpp goes through sizes, alignments and flags at random, under the sanitizers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import pyallreduce as par
from pyallreduce import _core, clipping
from pyallreduce.sgd_rule import change_of_unit, momentum_lr_of, scalars_of

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
MIXED = [(dtype, dtype) for dtype in FLOATS] + [(half, torch.float32) for half in HALVES]
SIZES = [3, 64, 4096, 1, 9001, 0, 517, 20000]  # elements of the parameters
LINE = 64  # bytes: every parameter begins on a cache line, as in the aggregator's buckets


@dataclass
class Machine:
    """Where kernels run: the twin on the host, or the GPU."""

    device: str
    kernels: type[_core.cuda_twin]

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0

    def image(self, table: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(table.image()), dtype=torch.uint8).clone().to(self.device)

    def update(self, table: Any, image: torch.Tensor, rules: Any, **arguments: Any) -> None:
        self.kernels.update(
            table, image.data_ptr(), rules, stream=self.stream(), **addresses(arguments)
        )

    def inspect(self, table: Any, image: torch.Tensor, **arguments: Any) -> None:
        self.kernels.inspect(table, image.data_ptr(), stream=self.stream(), **addresses(arguments))


def addresses(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.data_ptr() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


@pytest.fixture(params=["twin", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    return twin() if request.param == "twin" else gpu()


def twin() -> Machine:
    return Machine("cpu", _core.cuda_twin)


def gpu() -> Machine:
    return Machine("cuda", _core.cuda)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))


@dataclass
class Bucket:
    """Parameters in flat buffers of one layout; gradients end with a flag per parameter."""

    gradient: torch.dtype
    weight: torch.dtype
    device: str
    seed: int = 1
    has_copies: bool = False
    begins: list[int] = field(init=False)

    def __post_init__(self) -> None:
        line = LINE // self.gradient.itemsize
        self.begins = [0]
        for size in SIZES:
            self.begins.append(self.begins[-1] + (size + line - 1) // line * line)
        generator = torch.Generator().manual_seed(self.seed)

        def flat(dtype: torch.dtype, extra: int = 0) -> torch.Tensor:
            return torch.randn(self.begins[-1] + extra, generator=generator).to(dtype)

        self.weights, self.momentum = (flat(self.weight).to(self.device) for _ in "wm")
        self.gradients = flat(self.gradient, extra=len(SIZES)).to(self.device)
        self.copies = self.weights.to(self.gradient)
        self.flags.fill_(1)

    @property
    def flags(self) -> torch.Tensor:
        return self.gradients[self.begins[-1] :]

    def piece(self, flat: torch.Tensor, i: int) -> torch.Tensor:
        return flat[self.begins[i] : self.begins[i] + SIZES[i]]

    def table(self, groups: list[int] | None = None, has_momentum: bool = True) -> Any:
        groups = groups or [0] * len(SIZES)
        pieces = []
        for i, size in enumerate(SIZES):
            at = self.begins[i] * self.weight.itemsize
            short = self.begins[i] * self.gradient.itemsize
            copy = short if self.has_copies else None
            pieces.append((at, at if has_momentum else None, short, copy, size, groups[i]))
        return _core.kernels.UpdateTable(name_of(self.gradient), name_of(self.weight), pieces)

    def spans(self) -> dict[str, torch.Tensor]:
        return {
            "weights": self.weights,
            "momentum": self.momentum,
            "gradients": self.gradients,
            "copies": self.copies,
        }

    def update_on_cpu(
        self, scalars: Any, scale: float, idle: tuple[int, ...] = (), zero: bool = False
    ) -> None:
        """By the CPU kernels, piece by piece."""
        for i in set(range(len(SIZES))) - set(idle):
            gradient = self.piece(self.gradients, i)
            wide = gradient if self.gradient == self.weight else gradient.to(self.weight)
            weight, momentum = self.piece(self.weights, i), self.piece(self.momentum, i)
            _core.kernels.sgd(
                [wide.data_ptr()],
                [weight.data_ptr()],
                momentum.data_ptr(),
                SIZES[i],
                name_of(self.weight),
                scalars,
                scale,
            )
            if self.has_copies:
                self.piece(self.copies, i).copy_(weight.to(self.gradient))
            if zero:
                gradient.zero_()


def scalars(lr: float = 0.1, momentum: float = 0.9, nesterov: bool = True) -> Any:
    return _core.kernels.SgdScalars(
        decay=1e-4, history=momentum, gain=1.0, momentum=momentum, rate=lr, nesterov=nesterov
    )


def rule(**settings: Any) -> Any:
    return _core.kernels.UpdateRule(scalars(**settings))


def assert_equal_buckets(one: Bucket, other: Bucket) -> None:
    for name, flat in one.spans().items():
        assert same_bits(flat, other.spans()[name]), name


# ---- what is there ----


def test_cuda_is_there_exactly_when_compiled_in() -> None:
    assert hasattr(_core, "cuda") == _core.has_cuda
    if _core.has_cuda:
        assert _core.cuda.device_count() == _core.cuda_device_count()
        assert {n for n in dir(_core.cuda_twin) if n[0] != "_"} == {
            n for n in dir(_core.cuda) if n[0] != "_"
        } - {"device_count"}


@pytest.mark.skipif(not _core.has_cuda, reason="built without CUDA (no nvcc)")
def test_without_a_gpu_a_launch_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    one = torch.ones(4)
    with pytest.raises(par.Error, match="cuda"):
        _core.cuda.copy(one.data_ptr(), one.data_ptr(), 16)
    assert _core.cuda_device_count() == 0


# ---- the update ----


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("gradient", "weight"), MIXED, ids=name_of)
def test_an_update_has_the_bits_of_the_cpu_kernels(
    machine: Machine, gradient: torch.dtype, weight: torch.dtype, nesterov: bool
) -> None:
    bucket, expected = (
        Bucket(gradient, weight, device, has_copies=gradient != weight)
        for device in (machine.device, "cpu")
    )
    table = bucket.table()
    image = machine.image(table)
    for scale in (1.0, 1 / 3):
        machine.update(table, image, [rule(nesterov=nesterov)], scale=scale, **bucket.spans())
        expected.update_on_cpu(scalars(nesterov=nesterov), scale)
    assert_equal_buckets(bucket, expected)


def test_groups_have_rules_of_their_own_however_many(machine: Machine) -> None:
    bucket, expected = (
        Bucket(torch.float32, torch.float32, device) for device in (machine.device, "cpu")
    )
    groups = [0, 70, 1, 33, 31, 0, 32, 64]  # of which a launch takes 32
    table = bucket.table(groups)
    rates = [0.01 * (group + 1) for group in range(71)]
    rules = [rule(lr=rate, nesterov=rate < 0.3) for rate in rates]
    total = torch.zeros(1, dtype=torch.float64, device=machine.device)
    machine.update(table, machine.image(table), rules, sum_squares=total, **bucket.spans())
    squares = bucket.gradients[: bucket.begins[-1]].double().cpu()
    want = sum(float(bucket.piece(squares, i).square().sum()) for i in range(len(SIZES)))
    assert float(total) == pytest.approx(want, rel=1e-12)
    for i, group in enumerate(groups):
        others = tuple(set(range(len(SIZES))) - {i})
        s = scalars(lr=rates[group], nesterov=rates[group] < 0.3)
        expected.update_on_cpu(s, 1.0, idle=others)
    assert_equal_buckets(bucket, expected)


def test_without_momentum_and_with_gradients_zeroed(machine: Machine) -> None:
    bucket = Bucket(torch.float32, torch.float32, machine.device)
    before = Bucket(torch.float32, torch.float32, "cpu")
    table = bucket.table(has_momentum=False)
    machine.update(
        table, machine.image(table), [rule(momentum=0.0)], zero_gradients=True, **bucket.spans()
    )
    assert same_bits(bucket.momentum, before.momentum)
    assert torch.equal(bucket.flags.cpu(), before.flags)
    for i in range(len(SIZES)):
        assert not bucket.piece(bucket.gradients, i).any()
        weight = before.piece(before.weights, i)
        gradient = before.piece(before.gradients, i) + 1e-4 * weight
        assert torch.equal(bucket.piece(bucket.weights, i).cpu(), weight - 0.1 * gradient)


def test_an_unused_parameter_keeps_its_weight_and_its_momentum_changes_unit(
    machine: Machine,
) -> None:
    bucket, expected = (
        Bucket(torch.bfloat16, torch.float32, device, has_copies=True)
        for device in (machine.device, "cpu")
    )
    idle = (1, 4, 6)
    for i in idle:
        for each in (bucket, expected):
            each.flags[i] = 0
            each.piece(each.gradients, i).zero_()
        expected.piece(expected.momentum, i).mul_(0.7)
    table = bucket.table()
    rules = [_core.kernels.UpdateRule(scalars(), idle_scale=0.7)]
    machine.update(table, machine.image(table), rules, flags=bucket.flags, **bucket.spans())
    expected.update_on_cpu(scalars(), 1.0, idle=idle)
    assert_equal_buckets(bucket, expected)


@pytest.mark.parametrize("settings", [
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True},
    {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False},
])  # fmt: skip
def test_ten_steps_agree_with_torch(machine: Machine, settings: dict[str, Any]) -> None:
    bucket = Bucket(torch.float32, torch.float32, machine.device)
    bucket.momentum.zero_()
    params = [
        torch.nn.Parameter(bucket.piece(bucket.weights, i).clone()) for i in range(len(SIZES))
    ]
    optimizer = torch.optim.SGD(params, **settings)
    table = bucket.table(has_momentum=settings["momentum"] > 0)
    image = machine.image(table)
    s = _core.kernels.SgdScalars(
        decay=settings["weight_decay"], history=settings["momentum"], gain=1.0,
        momentum=settings["momentum"], rate=settings["lr"], nesterov=settings["nesterov"],
    )  # fmt: skip
    for step in range(10):
        fresh = Bucket(torch.float32, torch.float32, machine.device, seed=step).gradients
        bucket.gradients.copy_(fresh)
        for i, param in enumerate(params):
            param.grad = bucket.piece(fresh, i).clone()
        optimizer.step()
        machine.update(table, image, [_core.kernels.UpdateRule(s)], **bucket.spans())
    for i, param in enumerate(params):
        torch.testing.assert_close(
            bucket.piece(bucket.weights, i), param.data, rtol=1e-6, atol=1e-6
        )


# ---- what comes from the device ----


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form", ["reference", "absorbed", "corrected"])
def test_a_learning_rate_on_the_device_is_the_same_as_on_the_host(
    machine: Machine, form: str, nesterov: bool
) -> None:
    on_device, on_host = (Bucket(torch.float32, torch.float32, machine.device) for _ in "dh")
    for bucket in (on_device, on_host):
        bucket.flags[4] = 0  # the unit of an unused momentum changes too
    rate = torch.zeros(1, device=machine.device)
    unit = torch.zeros(1, dtype=torch.float64, device=machine.device)
    device_rule = _core.kernels.UpdateRule.on_device(
        form=form, decay=1e-4, momentum=0.9, nesterov=nesterov, learning_rate=rate.data_ptr(),
        momentum_unit=unit.data_ptr(),
    )  # fmt: skip
    group = {
        "form": "reference" if form == "reference" else "absorbed",
        "correction": form == "corrected",
        "weight_decay": 1e-4, "momentum": 0.9, "nesterov": nesterov, "momentum_lr": None,
    }  # fmt: skip
    table = on_device.table()
    image = machine.image(table)
    for lr in (0.0, 0.125, 0.125, 1.0, 0.0, 0.3, 0.03):
        rate.fill_(lr)
        group["lr"] = float(torch.tensor(lr))  # as float32 holds it
        machine.update(table, image, [device_rule], flags=on_device.flags, **on_device.spans())
        machine.kernels.close_step([device_rule], stream=machine.stream())
        host_rule = _core.kernels.UpdateRule(scalars_of(group), change_of_unit(group))
        machine.update(table, image, [host_rule], flags=on_host.flags, **on_host.spans())
        group["momentum_lr"] = momentum_lr_of(group)
        assert_equal_buckets(on_device, on_host)
        if form == "corrected":
            assert float(unit) == group["momentum_lr"]


def test_a_corrected_momentum_needs_the_place_of_its_unit(machine: Machine) -> None:
    bucket = Bucket(torch.float32, torch.float32, machine.device)
    table = bucket.table()
    without = _core.kernels.UpdateRule.on_device(
        form="corrected", decay=0.0, momentum=0.9, nesterov=True, learning_rate=64
    )
    with pytest.raises(par.UsageError, match="needs its unit"):
        machine.update(table, machine.image(table), [without], **bucket.spans())


def test_loss_scale_and_clipping_are_factors_on_the_device(machine: Machine) -> None:
    bucket, expected = (
        Bucket(torch.float32, torch.float32, device) for device in (machine.device, "cpu")
    )
    table = bucket.table()
    image = machine.image(table)
    loss_scale = torch.full((1,), 1024.0, device=machine.device)
    total, factor = (torch.zeros(1, dtype=torch.float64, device=machine.device) for _ in "tf")
    machine.inspect(
        table, image, gradients=bucket.gradients, loss_scale=loss_scale, sum_squares=total
    )
    scaled = [expected.piece(expected.gradients, i).double() / 1024 for i in range(len(SIZES))]
    norm = math.sqrt(sum(float(each.square().sum()) for each in scaled))
    assert math.sqrt(float(total)) == pytest.approx(norm, rel=1e-12)
    for max_norm in (norm / 3, norm * 2):
        machine.kernels.clip(total.data_ptr(), max_norm, factor.data_ptr(), stream=machine.stream())
        assert float(factor) == clipping.coefficient(math.sqrt(float(total)), max_norm)
        machine.update(table, image, [rule()], loss_scale=loss_scale, clip=factor, **bucket.spans())
        expected.update_on_cpu(scalars(), 1 / 1024 * float(factor))
    assert_equal_buckets(bucket, expected)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("gradient", [torch.float32, torch.float16], ids=name_of)
def test_an_overflow_is_found_and_then_changes_nothing(
    machine: Machine, gradient: torch.dtype, value: float
) -> None:
    bucket, before = (Bucket(gradient, torch.float32, machine.device) for _ in "ab")
    table = bucket.table()
    image = machine.image(table)
    found_inf = torch.zeros(1, device=machine.device)
    total = torch.zeros(1, dtype=torch.float64, device=machine.device)
    look = {"gradients": bucket.gradients, "new_found_inf": found_inf, "sum_squares": total}
    machine.inspect(table, image, **look)
    assert float(found_inf) == 0
    assert math.isfinite(float(total))
    for i in (0, 4, 7):
        for each in (bucket, before):
            each.piece(each.gradients, i)[-1] = value
        found_inf.zero_()
        machine.inspect(table, image, **look)
        assert float(found_inf) == 1
        machine.update(
            table, image, [rule()], found_inf=found_inf, new_found_inf=found_inf,
            zero_gradients=True, **bucket.spans(),
        )  # fmt: skip
        assert_equal_buckets(bucket, before)
        for each in (bucket, before):
            each.piece(each.gradients, i)[-1] = 1
    machine.inspect(table, image, **look)
    assert float(found_inf) == 1  # until the caller clears it
    found_inf.zero_()
    machine.update(table, image, [rule()], found_inf=found_inf, **bucket.spans())
    assert not same_bits(bucket.weights, before.weights)


def test_a_scaled_gradient_that_overflows_is_found(machine: Machine) -> None:
    bucket = Bucket(torch.float16, torch.float16, machine.device)
    bucket.piece(bucket.gradients, 4)[17] = 60000
    table = bucket.table()
    found_inf = torch.zeros(1, device=machine.device)
    arguments = {"gradients": bucket.gradients, "new_found_inf": found_inf}
    machine.inspect(table, machine.image(table), scale=1.0, **arguments)
    assert float(found_inf) == 0
    machine.inspect(table, machine.image(table), scale=2.0, **arguments)
    assert float(found_inf) == 1


def test_after_an_abort_nothing_changes(machine: Machine) -> None:
    bucket, before = (Bucket(torch.float32, torch.float32, machine.device) for _ in "ab")
    flag = torch.zeros(1, dtype=torch.int32, pin_memory=machine.device == "cuda")
    table = bucket.table()
    image = machine.image(table)
    total = torch.zeros(1, dtype=torch.float64, device=machine.device)
    flag.fill_(1)
    for _ in range(2):
        machine.update(table, image, [rule()], aborted=flag, sum_squares=total, **bucket.spans())
    if machine.device == "cuda":
        torch.cuda.synchronize()
    assert_equal_buckets(bucket, before)
    assert float(total) == 0
    flag.zero_()
    machine.update(table, image, [rule()], aborted=flag, sum_squares=total, **bucket.spans())
    assert float(total) > 0
    assert not same_bits(bucket.weights, before.weights)


def test_findings_of_buckets_add_up(machine: Machine) -> None:
    buckets = [Bucket(torch.bfloat16, torch.float32, machine.device, seed) for seed in (1, 2)]
    total = torch.zeros(1, dtype=torch.float64, device=machine.device)
    alone = []
    for bucket in buckets:
        table = bucket.table()
        machine.update(table, machine.image(table), [rule()], sum_squares=total, **bucket.spans())
        one = torch.zeros_like(total)
        machine.inspect(table, machine.image(table), gradients=bucket.gradients, sum_squares=one)
        alone.append(float(one))
    assert float(total) == alone[0] + alone[1]
    wide = [
        bucket.piece(bucket.gradients, i).double() for bucket in buckets for i in range(len(SIZES))
    ]
    assert float(total) == pytest.approx(math.fsum(float(w.square().sum()) for w in wide))


# ---- pack, unpack, cast, scale, reduce, copy ----

CASTS = [(dtype, dtype) for dtype in FLOATS]
CASTS += [pair for half in HALVES for pair in ((half, torch.float32), (torch.float32, half))]


@pytest.mark.parametrize(("source", "target"), CASTS, ids=name_of)
def test_packs_and_unpacks_with_cast_and_scale(
    machine: Machine, source: torch.dtype, target: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(n, generator=generator).to(source).to(machine.device) for n in SIZES]
    tensors[4][::7] = torch.tensor([math.nan, -math.nan, math.inf, -0.0])[
        torch.arange(len(tensors[4][::7])) % 4
    ].to(tensors[4])
    flat = torch.zeros(sum(SIZES), dtype=target, device=machine.device)  # without gaps
    begins = [0, *itertools.accumulate(SIZES)]
    spans = [
        (t.data_ptr(), begin * target.itemsize, t.numel())
        for t, begin in zip(tensors, begins, strict=False)
    ]
    table = _core.kernels.SpanTable(name_of(source), name_of(target), spans)
    image = machine.image(table)
    machine.kernels.cast(
        table, image.data_ptr(), destinations=flat.data_ptr(), scale=0.3, stream=machine.stream()
    )
    wide = torch.float64 if source == torch.float64 else torch.float32
    for tensor, begin in zip(tensors, begins, strict=False):
        expected = (tensor.to(wide) * torch.tensor(0.3, dtype=wide)).to(target)
        result = flat[begin : begin + tensor.numel()]
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(), expected.nan_to_num())
        quiet = torch.full_like(result[result.isnan()].cpu(), math.nan)
        assert same_bits(result[result.isnan()], quiet)
    back = [torch.zeros_like(t) for t in tensors]
    spans = [
        (begin * target.itemsize, t.data_ptr(), t.numel())
        for t, begin in zip(back, begins, strict=False)
    ]
    table = _core.kernels.SpanTable(name_of(target), name_of(source), spans)
    image = machine.image(table)
    machine.kernels.cast(table, image.data_ptr(), sources=flat.data_ptr(), stream=machine.stream())
    for tensor, begin in zip(back, begins, strict=False):
        expected = flat[begin : begin + tensor.numel()].to(source)
        assert torch.equal(tensor.isnan(), expected.isnan())
        assert torch.equal(tensor.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_reduces_with_the_bits_of_the_cpu_kernels(machine: Machine, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    for length, offset in [(100_003, 0), (4097, 1), (5, 3)]:
        sources = [torch.randn(length + 3, generator=generator).to(dtype) for _ in range(3)]
        expected = torch.empty(length, dtype=dtype)
        _core.kernels.reduce(
            [s[offset:].data_ptr() for s in sources], [expected.data_ptr()], length,
            name_of(dtype), "avg", 1 / 3,
        )  # fmt: skip
        there = [s.to(machine.device)[offset:] for s in sources]
        targets = [there[1].data_ptr(), there[2].data_ptr()]
        machine.kernels.reduce(
            [t.data_ptr() for t in there], targets, length, name_of(dtype), 1 / 3,
            stream=machine.stream(),
        )  # fmt: skip
        assert same_bits(there[1][:length], expected)
        assert same_bits(there[2][:length], expected)
        assert same_bits(there[0], sources[0][offset:])


def test_copies(machine: Machine) -> None:
    source = torch.randint(256, (4_000_004,), dtype=torch.uint8).to(machine.device)
    target = torch.zeros_like(source)
    machine.kernels.copy(
        source[4:].data_ptr(), target[4:].data_ptr(), 4_000_000, stream=machine.stream()
    )
    assert torch.equal(source[4:], target[4:])
    assert not target[:4].any()


# ---- only on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [0, 1, 7, 2000])
@pytest.mark.parametrize(("gradient", "weight"), MIXED, ids=name_of)
def test_a_gpu_has_the_twins_bits_whatever_the_grid(
    gradient: torch.dtype, weight: torch.dtype, blocks: int
) -> None:
    results = []
    for machine in (gpu(), twin()):
        bucket = Bucket(gradient, weight, machine.device, has_copies=gradient != weight)
        table = bucket.table([0, 1, 2, 0, 1, 2, 0, 1])
        bucket.flags[2] = 0
        bucket.piece(bucket.gradients, 2).zero_()
        total = torch.zeros(1, dtype=torch.float64, device=machine.device)
        rules = [rule(), rule(lr=0.3, nesterov=False), rule(momentum=0.0)]
        machine.update(
            table, machine.image(table), rules, flags=bucket.flags, scale=0.3, sum_squares=total,
            zero_gradients=True, max_blocks=blocks, **bucket.spans(),
        )  # fmt: skip
        results.append((bucket, total))
    assert_equal_buckets(results[0][0], results[1][0])
    assert same_bits(results[0][1], results[1][1])


@pytest.mark.gpu
def test_launches_return_while_the_gpu_is_busy() -> None:
    machine, done = gpu(), torch.cuda.Event()
    bucket = Bucket(torch.float32, torch.float32, "cuda")
    table = bucket.table()
    image, flag = machine.image(table), torch.zeros(1, dtype=torch.int32).pin_memory()
    total, factor = (torch.zeros(1, dtype=torch.float64, device="cuda") for _ in "tf")
    rate = torch.ones(1, device="cuda")
    on_device = _core.kernels.UpdateRule.on_device(
        form="absorbed", decay=0.0, momentum=0.9, nesterov=True, learning_rate=rate.data_ptr()
    )
    for busy in (False, True):  # the first round loads the kernels
        if busy:
            torch.cuda._sleep(2_000_000_000)  # cycles: about a second
        machine.inspect(table, image, gradients=bucket.gradients, sum_squares=total)
        machine.kernels.clip(total.data_ptr(), 1.0, factor.data_ptr(), stream=machine.stream())
        machine.update(table, image, [on_device], clip=factor, aborted=flag, **bucket.spans())
        machine.kernels.close_step([on_device], stream=machine.stream())
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_captured_update_follows_what_lies_on_the_device() -> None:
    machine = gpu()
    captured, plain = (Bucket(torch.float32, torch.float32, "cuda") for _ in "cp")
    table = captured.table()
    images = [machine.image(table) for _ in "cp"]
    rate = torch.full((1,), 0.1, device="cuda")
    units = [torch.zeros(1, dtype=torch.float64, device="cuda") for _ in "cp"]
    found_inf = torch.zeros(1, device="cuda")
    rules = [
        [_core.kernels.UpdateRule.on_device(
            form="corrected", decay=1e-4, momentum=0.9, nesterov=True,
            learning_rate=rate.data_ptr(), momentum_unit=unit.data_ptr(),
        )] for unit in units
    ]  # fmt: skip

    def step(k: int, bucket: Bucket) -> None:
        machine.update(table, images[k], rules[k], found_inf=found_inf, **bucket.spans())
        machine.kernels.close_step(
            rules[k], found_inf=found_inf.data_ptr(), stream=machine.stream()
        )

    step(0, captured)  # kernels are loaded before the capture
    step(1, plain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0, captured)
    for lr, inf in [(0.1, 0.0), (0.4, 0.0), (0.4, 1.0), (0.05, 0.0)]:
        rate.fill_(lr)
        found_inf.fill_(inf)
        graph.replay()
        step(1, plain)
        torch.cuda.synchronize()
        assert_equal_buckets(captured, plain)
        assert torch.equal(*units)

"""par.SGD against torch.optim.SGD, its two forms against each other, and what surrounds an optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyallreduce as par

STEPS = 20


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (5,), (3, 4, 2, 2), (4, 3, 1, 1), (), (0, 3), (1003,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    return [nn.Parameter(t.to(dtype)) for t in tensors]


def set_gradients(params: list[nn.Parameter], t: int, scale: float = 1.0) -> None:
    """Of a rough bowl, so that weights stay bounded."""
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
        p.grad = (scale * (0.3 * p.detach() + noise.to(p.dtype))).to(p.dtype)


def run(
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: int = STEPS,
    rate: Callable[[int], float] | None = None,
    first: int = 0,
) -> list[nn.Parameter]:
    for t in range(first, first + steps):
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(t)
        set_gradients(params, t)
        optimizer.step()
    return params


def gap(a: list[Any], b: list[Any]) -> float:
    """Largest difference relative to the largest value."""
    top = max(y.abs().max().item() for y in b if y.numel())
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True) if x.numel()) / top


def momentum_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state["momentum_buffer"] for state in optimizer.state_dict()["state"].values()]


def same_bits(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- against torch.optim.SGD ---------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False},
    "decay": {"momentum": 0.0, "weight_decay": 1e-2, "nesterov": False},
    "momentum": {"momentum": 0.9, "weight_decay": 0.0, "nesterov": False},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.0, "nesterov": True},
    "all": {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
}
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("form", ["reference", "absorbed"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_equals_torch(name: str, form: str, dtype: torch.dtype) -> None:
    options = OPTIONS[name]
    ours, theirs = parameters(dtype), parameters(dtype)
    mine = par.SGD(ours, lr=0.05, form=form, **options)
    stock = torch.optim.SGD(theirs, lr=0.05, **options)
    run(ours, mine)
    run(theirs, stock)
    assert gap(ours, theirs) <= BOUNDS[dtype]
    assert gap(ours, parameters(dtype)) > 0.1  # it moved
    if options["momentum"] and form == "reference":
        assert gap(momentum_of(mine), momentum_of(stock)) <= BOUNDS[dtype]
    else:
        assert bool(momentum_of(mine)) == bool(options["momentum"])


def test_default_options_are_the_papers() -> None:
    ours, theirs = parameters(), parameters()
    run(ours, par.SGD(ours, 0.1))
    run(
        theirs,
        torch.optim.SGD(theirs, 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True),
    )
    assert gap(ours, theirs) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_follow_float64(dtype: torch.dtype) -> None:
    ours, exact = parameters(dtype), parameters()
    mine, stock = (
        par.SGD(ours, lr=0.05),
        torch.optim.SGD(exact, lr=0.05, momentum=0.9, nesterov=True),
    )
    for t in range(STEPS):
        set_gradients(exact, t)
        for p, q in zip(ours, exact, strict=True):
            p.grad = q.grad.to(dtype)
        mine.step()
        stock.step()
    rounding = torch.finfo(dtype).eps
    assert gap([p.double() for p in ours], exact) <= 4 * rounding
    assert all(p.dtype == dtype for p in [*ours, *momentum_of(mine)])


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:2], "weight_decay": 0.0},
        {"params": params[2:4], "lr": 0.2, "momentum": 0.5},
        {"params": params[4:], "nesterov": False},
    ]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.1 + 0.3 * t),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [5, 9, 14]),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=STEPS + 1, cycle_momentum=True
    ),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=6),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS - 6),
        ],
        [6],
    ),
}


@pytest.mark.parametrize("form", ["reference", "absorbed"])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_groups_and_schedulers(name: str, form: str) -> None:
    results = []
    for make in (torch.optim.SGD, par.SGD):
        params = parameters()
        options = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True, "lr": 0.05}
        if make is par.SGD:
            options["form"] = form
        optimizer = make(groups(params), **options)
        scheduler = SCHEDULERS[name](optimizer)
        for t in range(STEPS):
            set_gradients(params, t)
            optimizer.step()
            scheduler.step()
        results.append(params)
    assert gap(results[1], results[0]) <= 1e-12


def test_add_param_group() -> None:
    results = []
    for make in (torch.optim.SGD, par.SGD):
        params = parameters()
        options = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
        optimizer = make(params[:3], lr=0.05, **options)
        run(params, optimizer, 5)
        optimizer.add_param_group({"params": params[3:], "lr": 0.01})
        run(params, optimizer, 5, first=5)
        results.append(params)
    assert gap(results[1], results[0]) <= 1e-12


def test_learning_rate_may_be_a_tensor() -> None:
    results = []
    for lr in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        for form in ("reference", "absorbed"):
            params = parameters()
            run(params, par.SGD(params, lr, form=form))
            results.append(params)
    assert same_bits(results[0], results[2])
    assert same_bits(results[1], results[3])


# --- Remark 2: the two forms (acceptance test 6) -------------------------------------------------


def warmup_then_drops(t: int) -> float:
    """Gradual warmup over 100 steps to 32 x, then drops at 150, 200 and 250."""
    base = 0.001 * (1 + 31 * min(t, 100) / 100)
    return base * 0.1 ** sum(t >= at for at in (150, 200, 250))


def constant_warmup(t: int) -> float:
    return 0.001 if t < 50 else 0.032


def through_zero(t: int) -> float:
    """Cosine annealing with a restart, and a warmup from zero."""
    return 0.0 if t % 40 in (0, 1, 39) else 0.03 * (t % 40) / 40


RATES = {
    "warmup and drops": warmup_then_drops,
    "x32 jump": constant_warmup,
    "through zero": through_zero,
}


def quadratic(
    rate: Callable[[int], float], steps: int = 300, nesterov: bool = True, **options: Any
) -> tuple[list[nn.Parameter], par.SGD]:
    """On a quadratic with curvatures from 0.1 to 10, started off its minimum."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(200, dtype=torch.float64))
    optimizer = par.SGD([w], lr=1.0, weight_decay=1e-4, nesterov=nesterov, **options)
    return continue_quadratic(w, optimizer, rate, range(steps))


def continue_quadratic(
    w: nn.Parameter, optimizer: par.SGD, rate: Callable[[int], float], when: range
) -> tuple[list[nn.Parameter], par.SGD]:
    curvatures = torch.logspace(-1, 1, w.numel(), dtype=torch.float64)
    for t in when:
        optimizer.param_groups[0]["lr"] = rate(t)
        w.grad = curvatures * w.detach() + torch.sin(torch.arange(w.numel()) + t)
        optimizer.step()
    return [w], optimizer


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", list(RATES))
def test_corrected_forms_are_equal(name: str, nesterov: bool) -> None:
    reference, _ = quadratic(RATES[name], nesterov=nesterov)
    absorbed, _ = quadratic(RATES[name], nesterov=nesterov, form="absorbed")
    assert gap(absorbed, reference) <= 1e-12


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("name", "steps"), [("warmup and drops", 50), ("x32 jump", 60)])
def test_uncorrected_absorbed_form_is_the_pitfall(name: str, steps: int, nesterov: bool) -> None:
    """Measured soon after the change of rate: later both have converged to the same minimum."""
    reference, _ = quadratic(RATES[name], steps, nesterov=nesterov)
    absorbed, _ = quadratic(
        RATES[name], steps, nesterov=nesterov, form="absorbed", correction=False
    )
    assert gap(absorbed, reference) > 1e-2


@pytest.mark.parametrize("nesterov", [False, True])
def test_correction_at_a_constant_rate_changes_no_bit(nesterov: bool) -> None:
    results = [
        quadratic(lambda t: 0.017, nesterov=nesterov, form="absorbed", correction=correction)[0]
        for correction in (False, True)
    ]
    assert same_bits(*results)


def test_correction_does_not_touch_the_reference_form() -> None:
    results = [quadratic(constant_warmup, correction=correction)[0] for correction in (False, True)]
    assert same_bits(*results)


def test_momentum_of_unused_parameters_is_corrected_too() -> None:
    """Their gradient is None in the steps in which the rate changes."""
    results = []
    for form in ("reference", "absorbed"):
        params = parameters()
        optimizer = par.SGD(params, lr=0.05, form=form)
        for t in range(12):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + t % 4)
            set_gradients(params, t)
            for i, p in enumerate(params):
                if (t + i) % 3:
                    p.grad = None
            optimizer.step()
        results.append(params)
    assert gap(results[1], results[0]) <= 1e-12


# --- state ---------------------------------------------------------------------------------------


def through_file(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize("form", ["reference", "absorbed"])
@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("at", [1, 40, 100, 175])
def test_resume_continues_to_the_same_bits(form: str, correction: bool, at: int) -> None:
    options = {"form": form, "correction": correction}
    whole, _ = quadratic(warmup_then_drops, 200, **options)
    (w,), optimizer = quadratic(warmup_then_drops, at, **options)
    saved = through_file(optimizer.state_dict())
    fresh = nn.Parameter(w.detach().clone())
    resumed = par.SGD([fresh], lr=1.0, **options)
    resumed.load_state_dict(saved)
    continue_quadratic(fresh, resumed, warmup_then_drops, range(at, 200))
    assert same_bits([fresh], whole)


def test_state_of_torch_is_read_and_written() -> None:
    options = OPTIONS["all"]
    theirs = parameters()
    stock = torch.optim.SGD(theirs, lr=0.05, **options)
    run(theirs, stock, 5)
    saved, weights = through_file(stock.state_dict()), copy.deepcopy(theirs)
    run(theirs, stock, 5, first=5)
    for form in ("reference", "absorbed"):
        ours = copy.deepcopy(weights)
        mine = par.SGD(ours, lr=1.0, form=form)
        mine.load_state_dict(copy.deepcopy(saved))
        run(ours, mine, 5, first=5)
        assert gap(ours, theirs) <= 1e-12

    ours = parameters()
    mine = par.SGD(ours, lr=0.05, **options)
    run(ours, mine, 5)
    back = copy.deepcopy(ours)
    stock = torch.optim.SGD(back, lr=1.0)
    stock.load_state_dict(through_file(mine.state_dict()))
    run(back, stock, 5, first=5)
    run(ours, mine, 5, first=5)
    assert gap(back, ours) <= 1e-12
    assert stock.param_groups[0]["nesterov"] is True


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_state_of_torch_in_absorbed_form_at_a_new_rate(rate: float) -> None:
    """torch's momentum is in units of a learning rate of 1."""
    theirs = parameters()
    stock = torch.optim.SGD(theirs, lr=0.05, **OPTIONS["all"])
    run(theirs, stock, 5)
    ours = copy.deepcopy(theirs)
    mine = par.SGD(ours, lr=1.0, form="absorbed")
    mine.load_state_dict(copy.deepcopy(stock.state_dict()))
    run(theirs, stock, 5, lambda t: rate, first=5)
    run(ours, mine, 5, lambda t: rate, first=5)
    assert gap(ours, theirs) <= 1e-12


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("form", ["reference", "absorbed"])
def test_copies_go_on_alike(copier: Callable[[Any], Any], form: str) -> None:
    params = parameters()
    optimizer = par.SGD(params, lr=0.05, form=form)
    run(params, optimizer, 5)
    twins, twin = copier((params, optimizer))
    for p, o in ((params, optimizer), (twins, twin)):
        run(p, o, 5, lambda t: 0.01 * t, first=5)
    assert same_bits(params, twins)
    assert same_bits(momentum_of(optimizer), momentum_of(twin))
    assert params[0].data_ptr() != twins[0].data_ptr()


def test_a_bad_state_changes_nothing() -> None:
    params = parameters()
    optimizer = par.SGD(params, lr=0.05)
    run(params, optimizer, 2)
    good = copy.deepcopy(optimizer.state_dict())
    for name, value in (
        ("dampening", 0.5),
        ("maximize", True),
        ("momentum", -1.0),
        ("lr", float("nan")),
        ("form", "caffe"),
    ):
        bad = copy.deepcopy(good)
        bad["param_groups"][0][name] = value
        bad["state"][0]["momentum_buffer"].fill_(7)
        with pytest.raises(par.UsageError):
            optimizer.load_state_dict(bad)
        now = optimizer.state_dict()
        assert now["param_groups"] == good["param_groups"]
        assert same_bits(
            momentum_of(optimizer), [s["momentum_buffer"] for s in good["state"].values()]
        )


def test_a_momentum_of_another_shape_is_refused() -> None:
    """Before the kernel reads beyond its end."""
    params = [nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(4))]
    optimizer = par.SGD(params, lr=0.1)
    set_gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["momentum_buffer"] = torch.zeros(4, 3)
    optimizer.load_state_dict(state)
    before = [p.detach().clone() for p in params]
    with pytest.raises(par.UsageError, match=r"\(4, 3\)"):
        optimizer.step()
    assert same_bits(params, before)


def test_momentum_follows_a_change_of_dtype_or_memory_format() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3)
    optimizer = par.SGD(model.parameters(), lr=0.05)
    params = list(model.parameters())
    run(params, optimizer, 2)
    reference = copy.deepcopy(params)
    stock = torch.optim.SGD(reference, lr=0.05, **{**OPTIONS["all"], "weight_decay": 1e-4})
    stock.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.to(memory_format=torch.channels_last)
    run(params, optimizer, 2, first=2)
    run(reference, stock, 2, first=2)
    assert gap(params, reference) <= 1e-6
    model.double()
    for p in params:
        p.grad = None
    run(params, optimizer, 2, first=4)
    assert momentum_of(optimizer)[0].dtype == torch.float64


# --- GradScaler ----------------------------------------------------------------------------------


def scaled_run(
    make: Callable[..., torch.optim.Optimizer], overflow_at: tuple[int, ...], unscale: bool = False
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    params = parameters(torch.float32)
    optimizer = make(params, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=4)
    for t in range(8):
        set_gradients(params, t, scaler.get_scale())
        scaler.scale(torch.ones(()))  # as scaler.scale(loss) does: creates the scale
        if t in overflow_at:
            params[1].grad[2] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return params, optimizer


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("overflow_at", [(), (0,), (0, 1), (3,), (0, 4, 7)])
def test_overflow_touches_nothing(overflow_at: tuple[int, ...], unscale: bool) -> None:
    ours, mine = scaled_run(par.SGD, overflow_at, unscale)
    theirs, stock = scaled_run(torch.optim.SGD, overflow_at, unscale)
    assert gap(ours, theirs) <= 1e-6
    assert gap(momentum_of(mine), momentum_of(stock)) <= 1e-6


def test_overflow_in_the_first_step_leaves_no_state() -> None:
    params = parameters(torch.float32)
    before = copy.deepcopy(params)
    optimizer = par.SGD(params, lr=0.05, form="absorbed")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))
    set_gradients(params, 0)
    params[0].grad.fill_(float("nan"))
    scaler.step(optimizer)
    assert same_bits(params, before)
    assert optimizer.state_dict()["state"] == {}
    assert optimizer.param_groups[0]["momentum_lr"] is None


def test_gradients_are_unscaled_exactly_by_a_power_of_two() -> None:
    results = []
    for scale in (1.0, 1024.0):
        params = parameters()
        optimizer = par.SGD(params, lr=0.05)
        for t in range(5):
            set_gradients(params, t)
            for p in params:
                p.grad *= scale
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.found_inf = torch.tensor(0.0)
            optimizer.step()
        results.append(params)
    assert same_bits(*results)


# --- gradients and parameters of all kinds -------------------------------------------------------


def test_gradients_that_are_none_are_skipped() -> None:
    params = parameters()
    before = copy.deepcopy(params)
    optimizer = par.SGD(params, lr=0.05)
    set_gradients(params, 0)
    params[1].grad = params[3].grad = None
    optimizer.step()
    for i, (p, q) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(p, q) == (i in (1, 3) or p.numel() == 0)
        assert (p in optimizer.state) == (i not in (1, 3))
    for p in params:
        p.grad = None
    now = copy.deepcopy(params)
    optimizer.step()
    assert same_bits(params, now)


def test_gradients_of_any_layout_in_memory() -> None:
    results = []
    for disarrange in (False, True):
        params = parameters()
        optimizer = par.SGD(params, lr=0.05)
        for t in range(4):
            set_gradients(params, t)
            if disarrange:
                params[0].grad = params[0].grad.t().contiguous().t()
                params[2].grad = params[2].grad.contiguous()
                params[3].grad = params[3].grad.to(memory_format=torch.channels_last)
                wide = torch.empty(2 * params[6].numel(), dtype=torch.float64)
                params[6].grad = wide[::2].copy_(params[6].grad)
                expanded = params[1].grad.mean().expand(5)
                params[1].grad = expanded
            else:
                params[1].grad = params[1].grad.mean().repeat(5)
            grads = [p.grad.clone() for p in params]
            optimizer.step()
            assert same_bits([p.grad for p in params], grads)  # read, not written
        results.append(params)
        assert params[2].is_contiguous(memory_format=torch.channels_last)
        assert optimizer.state[params[2]]["momentum_buffer"].stride() == params[2].stride()
    assert same_bits(*results)


def test_wrong_gradients_and_parameters_are_usage_errors() -> None:
    good = nn.Parameter(torch.ones(3))
    sparse, gaps = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(4, 4)[:, ::2])
    optimizer = par.SGD([{"params": [good]}, {"params": [sparse, gaps]}], lr=0.1)
    good.grad = torch.ones(3)
    sparse.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(par.UsageError, match="sparse"):
        optimizer.step()
    sparse.grad = None
    gaps.grad = torch.ones(4, 2)
    with pytest.raises(par.UsageError, match="gaps"):
        optimizer.step()
    assert (good == 1).all()  # checks come before the first update
    gaps.grad = None
    optimizer.step()
    assert (good != 1).all()


def test_closure_and_version_counters() -> None:
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = par.SGD([w], lr=0.1)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == 3
    assert optimizer.step(closure).item() < 3
    assert len(calls) == 2
    assert optimizer.step() is None
    stale = (w * w).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="inplace operation"):
        stale.backward()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    params = parameters()
    optimizer = par.SGD(params, lr=0.1)
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none)
    for p in params:
        assert p.grad is None if set_to_none else (p.grad == 0).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -0.1},
        {"lr": float("nan")},
        {"momentum": -0.5},
        {"weight_decay": -1e-4},
        {"form": "caffe"},
        {"form": None},
    ],
)
def test_bad_arguments(bad: dict[str, Any]) -> None:
    params = parameters()
    with pytest.raises(par.UsageError, match=next(iter(bad))):
        par.SGD(params, **{"lr": 0.1, **bad})
    optimizer = par.SGD(params[:2], lr=0.1)
    with pytest.raises(par.UsageError, match=next(iter(bad))):
        optimizer.add_param_group({"params": params[2:], **bad})
    assert len(optimizer.param_groups) == 1
    run(params[:2], optimizer, 1)


def test_unsupported_parameters() -> None:
    for tensor in (
        torch.ones(2, dtype=torch.complex64),
        torch.empty(2, device="meta"),
    ):
        with pytest.raises(par.UsageError, match="CPU"):
            par.SGD([nn.Parameter(tensor)], lr=0.1)
    with pytest.raises(ValueError, match="empty"):
        par.SGD([], lr=0.1)
    with pytest.raises(par.UsageError):
        par.SGD([nn.Parameter(torch.ones(1))], lr=-1)  # a UsageError is a ValueError too
    with pytest.raises(ValueError):
        par.SGD([nn.Parameter(torch.ones(1))], lr=-1)


def test_mixed_dtypes_in_one_group() -> None:
    def weights() -> list[nn.Parameter]:
        kinds = (torch.float64, torch.float32, torch.bfloat16)
        return [nn.Parameter(torch.linspace(-1, 1, 50).to(dtype)) for dtype in kinds]

    together, apart = weights(), weights()
    optimizer = par.SGD(together, lr=0.05)
    single = [par.SGD([p], lr=0.05) for p in apart]
    for t in range(STEPS):
        set_gradients(together, t)
        set_gradients(apart, t)
        for o in (optimizer, *single):
            o.step()
    assert same_bits(together, apart)


def test_torchs_fused_sgd_keeps_a_momentum_that_nothing_has_written() -> None:
    """The negative control of test_overflow_in_the_first_step_leaves_no_state."""
    params = parameters(torch.float32)
    stock = torch.optim.SGD(params, lr=0.05, momentum=0.9, fused=True)
    set_gradients(params, 0)
    stock.grad_scale, stock.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    stock.step()
    if not stock.state_dict()["state"]:
        pytest.skip("this torch has repaired it")
    assert all(buffer is not None for buffer in momentum_of(stock))

"""The paper's exact equalities (tests 1 to 8 and 26 of section 3), each with what must not hold.

Ranks are processes. All equalities between k workers and one share one start of eight processes:
they form groups of 1, 2, 4 and 8 over an explicit store.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import pyallreduce as par
from ranks import run_ranks
from train import data, models, recipe
from train.config import Config, load_preset, preset_names
from train.models import BasicBlock

PAPER_DROPS = (Fraction(1, 3), Fraction(2, 3), Fraction(8, 9))
STEPS = 200
BN_STEPS = 100
KN = 32
DECAY = 1e-4


# The networks and the schedule that workers and reference share.


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


class Conv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.Tanh(),
            nn.Conv2d(4, 8, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8, 10),
        )


class Normed(nn.Sequential):
    """Batch norm and a residual block, small enough for 100 steps of 4 workers in a second."""

    def __init__(self) -> None:
        super().__init__(BasicBlock(1, 4, stride=2), nn.Flatten(), nn.Linear(64, 10))


def digits_resnet() -> nn.Module:
    return models.MODELS["digits-resnet"](10)


def make(network: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return network().to(dtype)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    train = data.digits().train
    return train.pixels.double(), train.labels


def schedule_for(steps: int) -> recipe.Schedule:
    """Ten epochs; a ramp from 0.05 to 0.1 in the first, drops at 1/3, 2/3, 8/9."""
    return recipe.make_schedule(
        minibatch=KN,
        steps_per_epoch=steps // 10,
        epochs=10,
        reference_lr=0.05,
        reference_minibatch=KN // 2,
        warmup_epochs=1,
        drops=PAPER_DROPS,
    )


def minibatches(count: int, steps: int, rank: int, size: int) -> list[np.ndarray]:
    """The ids of one worker in so many iterations over `count` images."""
    per_epoch = data.steps_per_epoch(count, KN)
    return [
        data.part(data.permutation(3, t // per_epoch, count), t % per_epoch, KN, rank, size)
        for t in range(steps)
    ]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The reference: stock torch, told what decays by the recipe."""
    return torch.optim.SGD(
        recipe.parameter_groups(model, DECAY), lr=0.1, momentum=0.9, nesterov=True
    )


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def statistics_of(model: nn.Module) -> Tensor:
    return torch.cat([b.flatten() for b in model.buffers() if b.is_floating_point()])


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


# What each of the eight processes does.

Images = tuple[Tensor, Tensor]
Trained = tuple[Tensor, Tensor | None, list[str]]


def train_worker(
    comm: par.Communicator,
    images: Images,
    network: Callable[[], nn.Module],
    dtype: torch.dtype,
    steps: int,
    update: str = "step",
) -> Trained:
    """Weights, batch-norm statistics, and a digest of the weights after every step."""
    pixels, labels = images[0].to(dtype), images[1]
    model = make(network, dtype)
    optimizer = par.SGD(recipe.parameter_groups(model, DECAY), lr=0.1, momentum=0.9, nesterov=True)
    aggregator = par.GradientAggregator(
        model, comm, op="sum", bucket_bytes=4096, optimizer=optimizer, update=update
    )
    schedule = schedule_for(steps)
    digests = []
    for t, ids in enumerate(minibatches(len(labels), steps, comm.rank, comm.size)):
        recipe.set_lr(optimizer, schedule, t)
        (nnf.cross_entropy(model(pixels[ids]), labels[ids]) / comm.size).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        digests.append(hashlib.sha256(flat(model).numpy().tobytes()).hexdigest())
    aggregator.close()
    return flat(model), statistics_of(model) if network is Normed else None, digests


def aggregate(comm: par.Communicator, images: Images, counts: list[int], divisor: float) -> Tensor:
    """The aggregated gradient when worker r holds counts[r] images and divides its summed loss."""
    pixels, labels = images
    model = make(Mlp, torch.float64)
    aggregator = par.GradientAggregator(model, comm, op="sum", bucket_bytes=4096)
    first = sum(counts[: comm.rank])
    mine = slice(first, first + counts[comm.rank])
    loss = nnf.cross_entropy(model(pixels[mine]), labels[mine], reduction="sum")
    (loss / divisor).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    aggregator.close()
    return gradient.clone()


def all_equalities(rank: int, size: int, port: int, pixels: Any, labels: Any) -> dict[Any, Any]:
    # Images come as arrays: importing scikit-learn eight times would cost more than training.
    images = torch.from_numpy(pixels), torch.from_numpy(labels)
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    results: dict[Any, Any] = {}
    for k in (1, 2, 4, 8):
        if rank >= k:
            continue
        group = torch.distributed.PrefixStore(f"k{k}", store)
        comm = par.init(store=group, rank=rank, size=k)
        for network, dtype in itertools.product((Mlp, Conv), (torch.float64, torch.float32)):
            results[k, network.__name__, dtype] = train_worker(comm, images, network, dtype, STEPS)
        if k == 4:
            results["eager"] = train_worker(comm, images, Mlp, torch.float64, STEPS, update="eager")
            results["bn"] = train_worker(comm, images, Normed, torch.float64, BN_STEPS)
            results["mean"] = aggregate(comm, images, [8, 8, 8, 8], divisor=32)
            results["local mean"] = aggregate(comm, images, [8, 8, 8, 8], divisor=8)
            results["uneven"] = aggregate(comm, images, [8, 8, 8, 5], divisor=29)
        comm.barrier()
        comm.close()
    return results


@pytest.fixture(scope="module")
def workers() -> list[dict[Any, Any]]:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pixels, labels = digits()
    return run_ranks(8, all_equalities, store.port, pixels.numpy(), labels.numpy(), deadline_s=100)


# Test 1: k workers of n/k images are one worker of n.


def train_alone(network: Callable[[], nn.Module], dtype: torch.dtype) -> Tensor:
    pixels, labels = digits()[0].to(dtype), digits()[1]
    model = make(network, dtype)
    optimizer, schedule = sgd(model), schedule_for(STEPS)
    for t, ids in enumerate(minibatches(len(labels), STEPS, 0, 1)):
        recipe.set_lr(optimizer, schedule, t)
        optimizer.zero_grad()
        nnf.cross_entropy(model(pixels[ids]), labels[ids]).backward()
        optimizer.step()
    return flat(model)


@pytest.mark.parametrize("network", [Mlp, Conv])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_k_workers_equal_one(workers, network, dtype, bound):
    alone = train_alone(network, dtype)
    start = flat(make(network, dtype))
    assert (
        gap(start, alone) > 0.1
    )  # it did learn: equality of untrained weights would prove nothing
    for k in (1, 2, 4, 8):
        assert gap(workers[0][k, network.__name__, dtype][0], alone) <= bound


@pytest.mark.parametrize("k", [2, 4, 8])
def test_every_worker_has_the_same_bits_after_every_step(workers, k):
    for key in itertools.product((k,), ("Mlp", "Conv"), (torch.float64, torch.float32)):
        digests = [workers[rank][key][2] for rank in range(k)]
        assert all(d == digests[0] for d in digests)
        assert len(set(digests[0])) == STEPS


def test_eager_and_step_give_the_same_bits(workers):
    for rank in range(4):
        assert workers[rank]["eager"][2] == workers[rank][4, "Mlp", torch.float64][2]


# Tests 2 and 26: batch norm is local to a worker; accumulation over the same groups is the same.


def accumulate(groups: int, whole: bool = False) -> tuple[Tensor, Tensor]:
    """One process: `groups` micro-batches per step, statistics kept from the first one only."""
    pixels, labels = digits()
    model = make(Normed, torch.float64)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    optimizer, schedule = sgd(model), schedule_for(BN_STEPS)
    parts = zip(
        *(minibatches(len(labels), BN_STEPS, r, groups) for r in range(groups)), strict=True
    )
    for t, micro in enumerate(parts):
        recipe.set_lr(optimizer, schedule, t)
        optimizer.zero_grad()
        for index, ids in enumerate(micro if not whole else [np.concatenate(micro)]):
            for norm in norms:
                norm.momentum = 0.1 if index == 0 else 0.0
            loss = nnf.cross_entropy(model(pixels[ids]), labels[ids])
            (loss if whole else loss / groups).backward()
        optimizer.step()
    return flat(model), statistics_of(model)


def test_batch_norm_workers_equal_accumulation(workers):
    weights, statistics = accumulate(4)
    assert gap(workers[0]["bn"][0], weights) <= 1e-12
    assert gap(workers[0]["bn"][1], statistics) <= 1e-12


def test_workers_share_weights_but_not_statistics(workers):
    for rank in range(1, 4):
        assert torch.equal(workers[rank]["bn"][0], workers[0]["bn"][0])
        assert gap(workers[rank]["bn"][1], workers[0]["bn"][1]) > 1e-3


def test_batch_norm_over_the_whole_minibatch_is_something_else(workers):
    assert gap(workers[0]["bn"][0], accumulate(4, whole=True)[0]) > 1e-3


# Test 3, Remark 3: the aggregate is the mean over all kn images.


def gradient_of_mean(count: int) -> Tensor:
    pixels, labels = digits()
    model = make(Mlp, torch.float64)
    nnf.cross_entropy(model(pixels[:count]), labels[:count]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_aggregate_is_the_mean_over_the_minibatch(workers):
    for rank in range(4):
        assert gap(workers[rank]["mean"], gradient_of_mean(32)) <= 1e-14
        assert torch.equal(workers[rank]["mean"], workers[0]["mean"])


def test_aggregate_of_local_means_is_k_times_too_large(workers):
    # k = 4 is a power of two: the factor is exact, not within rounding.
    assert torch.equal(workers[0]["local mean"], 4 * workers[0]["mean"])


def test_aggregate_of_an_uneven_minibatch_is_the_true_mean(workers):
    assert gap(workers[0]["uneven"], gradient_of_mean(29)) <= 1e-14


# Test 4, Remark 1: decay is added to the gradient, so scaling the loss is not scaling the rate.


def one_step(weight: Tensor, loss_factor: float, lr: float, decay: float) -> Tensor:
    """A plain SGD step on factor * sum(c w), whose gradient is factor * c everywhere."""
    parameter = nn.Parameter(weight.clone())
    optimizer = par.SGD([parameter], lr=lr, momentum=0.0, weight_decay=decay, nesterov=False)
    slopes = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype)
    (loss_factor * (slopes * parameter).sum()).backward()
    optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("k", [2, 8, 32])
def test_scaling_the_loss_leaves_decay_behind(k):
    torch.manual_seed(0)
    weight = torch.randn(1000, dtype=torch.float64)
    lr, decay = 0.1, 1e-2
    scaled_loss = one_step(weight, k, lr, decay)
    scaled_lr = one_step(weight, 1, k * lr, decay)
    expected = (k - 1) * lr * decay * weight
    assert (scaled_loss - scaled_lr - expected).abs().max() <= 1e-12
    assert expected.abs().max() > 1e-3  # and that difference is not small

    difference = one_step(weight, k, lr, 0.0) - one_step(weight, 1, k * lr, 0.0)
    assert difference.abs().max() <= 1e-12


@pytest.mark.parametrize("k", [1, 4, 32])
def test_weights_shrink_without_a_gradient(k):
    weight = torch.linspace(-2, 2, 1000, dtype=torch.float64)
    lr, decay = recipe.linear_scaled_lr(0.1, 256 * k, 256), 1e-4
    shrunk = one_step(weight, 0.0, lr, decay)
    assert (shrunk - weight * (1 - lr * decay)).abs().max() <= 1e-15


# Test 5: what decays, and how blocks begin.


def without_gradient(groups: list[dict[str, Any]]) -> None:
    optimizer = par.SGD(groups, lr=0.5, momentum=0.9, nesterov=True)
    for _ in range(3):
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in (m.weight, m.bias)]


def test_gamma_and_beta_do_not_decay():
    model = make(digits_resnet, torch.float64)
    recipe.initialise(model)
    for parameter in norm_parameters(model):
        nn.init.normal_(parameter)
    before = copy.deepcopy(model)
    without_gradient(recipe.parameter_groups(model, 1e-2))
    for now, then in zip(norm_parameters(model), norm_parameters(before), strict=True):
        assert torch.equal(now, then)
    assert not torch.equal(model.conv1.weight, before.conv1.weight)
    assert not torch.equal(model.fc.weight, before.fc.weight)


def test_gamma_would_decay_in_one_common_group():
    model = make(digits_resnet, torch.float64)
    gamma = model.bn1.weight.detach().clone()
    without_gradient([{"params": list(model.parameters()), "weight_decay": 1e-2}])
    assert not torch.equal(model.bn1.weight, gamma)


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    torchvision = pytest.importorskip(
        "torchvision", reason="torchvision has the ResNet-50 to count in"
    )
    model = torchvision.models.resnet50(weights=None)
    recipe.initialise(model)
    return model


def test_resnet50_has_106_tensors_without_decay(resnet50):
    decayed, exempt = recipe.parameter_groups(resnet50, DECAY)
    assert (len(exempt["params"]), exempt["weight_decay"]) == (106, 0.0)
    assert (len(decayed["params"]), decayed["weight_decay"]) == (161 - 106, DECAY)
    assert sum(p.numel() for g in (decayed, exempt) for p in g["params"]) == 25_557_032


def test_resnet50_has_16_zero_gammas(resnet50):
    gammas = {
        name: m.weight for name, m in resnet50.named_modules() if isinstance(m, nn.BatchNorm2d)
    }
    zero = {name for name, gamma in gammas.items() if (gamma == 0).all()}
    assert len(zero) == 16
    assert all(name.endswith(".bn3") for name in zero)
    assert all((gamma == 1).all() for name, gamma in gammas.items() if name not in zero)


def test_gamma_can_begin_with_one():
    model = models.build("resnet18", 10, zero_gamma=False)
    assert all((m.weight == 1).all() for m in recipe.batch_norms(model))


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet50", 25_557_032), ("resnet101", 44_549_160)]
)
def test_the_papers_networks_have_their_stride_on_the_3x3_convolution(name, parameters):
    with torch.device("meta"):  # counts, draws nothing
        model = models.MODELS[name](1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    halving = [b for b in recipe.residual_blocks(model) if b.conv2.stride == (2, 2)]
    assert len(halving) == 3
    assert all(b.conv1.stride == (1, 1) for b in recipe.residual_blocks(model))
    assert {(m.momentum, m.eps) for m in recipe.batch_norms(model)} == {(0.1, 1e-5)}


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_network_answers_with_its_classes(name):
    with torch.device("meta"):
        model = models.MODELS[name](7).eval()
        images = torch.empty(2, model.conv1.in_channels, 32, 32)
        assert model(images).shape == (2, 7)


def test_a_network_for_other_channels_is_refused():
    with pytest.raises(par.UsageError, match=r"takes images of 3 channels, but .* have 1"):
        models.build("cifar-resnet20", 10, channels=1)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_configuration(name):
    cfg = Config(**load_preset(name))
    assert cfg.model in models.MODELS
    assert recipe.LR_RULES[cfg.lr_rule] is recipe.linear_scaled_lr
    assert (cfg.warmup, cfg.batch_size, cfg.momentum, cfg.weight_decay) == (
        "gradual",
        32,
        0.9,
        1e-4,
    )
    assert cfg.drops == PAPER_DROPS
    assert cfg.warmup_epochs * 18 == cfg.epochs


@pytest.mark.parametrize("name", ["imagenet-resnet50", "imagenet-resnet101"])
@pytest.mark.parametrize("kn", [256 << i for i in range(9)])
def test_the_imagenet_presets_are_the_papers(name, kn):
    cfg = Config(**load_preset(name), minibatch=kn)
    schedule = recipe.make_schedule(
        minibatch=kn,
        steps_per_epoch=1_281_167 // kn,
        epochs=cfg.epochs,
        reference_lr=cfg.lr,
        reference_minibatch=cfg.reference_minibatch,
        warmup_epochs=cfg.warmup_epochs,
        drops=cfg.drops,
    )
    assert schedule == paper_schedule(kn)[0]


def test_frozen_parameters_are_in_no_group():
    model = digits_resnet()
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    held = {id(p) for g in recipe.parameter_groups(model, DECAY) for p in g["params"]}
    assert len(held) == len(list(model.parameters())) - 3


def test_blocks_begin_as_their_shortcut():
    model = make(digits_resnet, torch.float64)
    recipe.initialise(model)
    identity, projected, _ = model.stages
    x = torch.randn(4, 32, 8, 8, dtype=torch.float64)
    assert torch.equal(identity(x), nnf.relu(x))
    assert torch.equal(projected(x), nnf.relu(projected.downsample(x)))
    assert (projected.downsample[1].weight == 1).all()

    nn.init.ones_(recipe.last_norm(identity).weight)
    assert not torch.equal(identity(x), nnf.relu(x))


def test_initial_scales():
    torch.manual_seed(0)
    model = digits_resnet()
    recipe.initialise(model)
    weight = model.stages[2].conv2.weight  # fan-out: 3 * 3 * 128
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert (model.fc.bias == 0).all()


# Test 6, Remark 2: the absorbed form needs its correction whenever the rate changes.


def rates() -> list[float]:
    """300 steps: a ramp of 40, its peak, back to the start, a jump of 32 at once, three drops."""
    ramp = recipe.Schedule(0.001, 0.032, 40, (60,), 80)
    warm = [ramp(t) if t < 60 else 0.001 for t in range(100)]
    return warm + [0.032 * 0.1 ** sum(t >= d for d in (180, 220, 260)) for t in range(100, 300)]


class Quadratic:
    """(w - w*) A (w - w*) / 2 with curvatures from 0.1 to 10."""

    def __init__(self, form: str, nesterov: bool, correction: bool = True) -> None:
        curvature = torch.logspace(-1, 1, 50, dtype=torch.float64)
        target = torch.linspace(1, 2, 50, dtype=torch.float64)
        self.gradient = lambda w: curvature * (w - target)
        self.w = nn.Parameter(torch.zeros(50, dtype=torch.float64))
        self.optimizer = par.SGD(
            [self.w],
            lr=0.001,
            momentum=0.9,
            weight_decay=1e-4,
            nesterov=nesterov,
            form=form,
            correction=correction,
        )

    def run(self, lrs: list[float]) -> Tensor:
        """The path: weights after every step, [steps, 50]."""
        path = []
        for lr in lrs:
            self.optimizer.param_groups[0]["lr"] = lr
            self.w.grad = self.gradient(self.w.detach())
            self.optimizer.step()
            path.append(self.w.detach().clone())
        return torch.stack(path)


@pytest.mark.parametrize("nesterov", [False, True])
def test_both_forms_of_momentum_agree_whatever_the_rate_does(nesterov):
    reference = Quadratic("reference", nesterov).run(rates())
    absorbed = Quadratic("absorbed", nesterov).run(rates())
    uncorrected = Quadratic("absorbed", nesterov, correction=False).run(rates())
    assert ((absorbed - reference).abs().amax(1) / reference.abs().amax(1)).max() <= 1e-12
    assert ((uncorrected - reference).abs().amax(1) / reference.abs().amax(1)).max() > 1e-2


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_reference_form_is_torchs(nesterov):
    ours = Quadratic("reference", nesterov)
    path = ours.run(rates())
    stock = Quadratic("reference", nesterov)
    stock.optimizer = torch.optim.SGD(
        [stock.w], lr=0.001, momentum=0.9, weight_decay=1e-4, nesterov=nesterov
    )
    assert gap(path, stock.run(rates())) <= 1e-14


@pytest.mark.parametrize("nesterov", [False, True])
def test_correction_changes_no_bit_at_a_constant_rate(nesterov):
    constant = [0.01] * 100
    assert torch.equal(
        Quadratic("absorbed", nesterov).run(constant),
        Quadratic("absorbed", nesterov, correction=False).run(constant),
    )


@pytest.mark.parametrize("form", ["reference", "absorbed"])
def test_resuming_inside_the_warmup_changes_no_bit(form):
    whole = Quadratic(form, True).run(rates())
    first = Quadratic(form, True)
    first.run(rates()[:17])
    second = Quadratic(form, True)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    with torch.no_grad():
        second.w.copy_(first.w)
    assert torch.equal(second.run(rates()[17:]), whole[17:])


# Test 7: the paper's schedule with the paper's numbers.


def paper_schedule(kn: int) -> tuple[recipe.Schedule, int]:
    per_epoch = 1_281_167 // kn
    return recipe.make_schedule(
        minibatch=kn,
        steps_per_epoch=per_epoch,
        epochs=90,
        reference_lr=0.1,
        reference_minibatch=256,
        warmup_epochs=5,
        drops=PAPER_DROPS,
    ), per_epoch


@pytest.mark.parametrize("kn", [512 << i for i in range(8)])  # 512 ... 64k
def test_schedule_above_the_reference_minibatch(kn):
    schedule, per_epoch = paper_schedule(kn)
    peak, warmup = 0.1 * kn / 256, 5 * per_epoch
    assert schedule(0) == 0.1
    assert schedule(warmup) == pytest.approx(peak, rel=1e-15)
    steps = np.diff([schedule(t) for t in range(warmup + 1)])
    assert steps.max() - steps.min() <= 1e-12
    assert steps.min() > 0
    for epoch, factor in ((30, 0.1), (60, 0.01), (80, 0.001)):
        assert schedule(epoch * per_epoch - 1) == pytest.approx(peak * factor * 10, rel=1e-12)
        assert schedule(epoch * per_epoch) == pytest.approx(peak * factor, rel=1e-12)
    assert schedule.total == 90 * per_epoch


@pytest.mark.parametrize("kn", [64, 128, 256])
def test_schedule_has_no_ramp_up_to_the_reference_minibatch(kn):
    schedule, per_epoch = paper_schedule(kn)
    phases = itertools.pairwise((0, 30, 60, 80, 90))
    for (first, end), factor in zip(phases, (1, 0.1, 0.01, 0.001), strict=True):
        (rate,) = {schedule(t) for t in range(first * per_epoch, end * per_epoch)}
        assert rate == pytest.approx(0.1 * kn / 256 * factor, rel=1e-12)
    assert schedule.total == 90 * per_epoch


def test_schedule_at_8k_has_the_papers_increment():
    schedule, _ = paper_schedule(8192)
    assert schedule(schedule.warmup) == pytest.approx(3.2)
    assert schedule(1) - schedule(0) == pytest.approx(0.00397, abs=1e-5)


def at_8k(**values: Any) -> recipe.Schedule:
    settings = {
        "minibatch": 8192,
        "steps_per_epoch": 156,
        "epochs": 90,
        "reference_lr": 0.1,
        "reference_minibatch": 256,
        "warmup_epochs": 5,
        "drops": PAPER_DROPS,
    }
    return recipe.make_schedule(**{**settings, **values})


def test_the_three_warmups_at_8k():
    """PAPER 1.2; the gradual one is covered above."""
    none, constant = at_8k(warmup="none"), at_8k(warmup="constant")
    assert none.warmup == 0
    assert {none(t) for t in range(30 * 156)} == {0.1 * 8192 / 256}
    assert {constant(t) for t in range(5 * 156)} == {0.1}
    assert {constant(t) for t in range(5 * 156, 30 * 156)} == {0.1 * 8192 / 256}
    for t in (30 * 156, 60 * 156, 80 * 156, 90 * 156 - 1):
        assert none(t) == constant(t) == at_8k()(t)


@pytest.mark.parametrize("warmup", ["gradual", "constant", "none"])
@pytest.mark.parametrize("kn", [64, 256])
def test_no_warmup_up_to_the_reference_minibatch(warmup, kn):
    assert {at_8k(minibatch=kn, warmup=warmup)(t) for t in range(30 * 156)} == {0.1 * kn / 256}


@pytest.mark.parametrize(
    ("rule", "reference_lr", "peak"),
    [
        ("linear", 0.1, 3.2),
        ("linear", 0.05, 1.6),
        ("linear", 0.2, 6.4),
        ("fixed", 0.1, 0.1),
        ("sqrt", 0.1, 0.1 * 32**0.5),
    ],
)
def test_rates_of_table_2a_at_8k(rule, reference_lr, peak):
    schedule = at_8k(lr_rule=rule, reference_lr=reference_lr)
    assert schedule.peak == schedule(29 * 156) == pytest.approx(peak)
    assert schedule(0) == reference_lr
    assert schedule.warmup == (0 if rule == "fixed" else 5 * 156)


@pytest.mark.parametrize("rule", ["linear", "sqrt", "fixed"])
def test_all_rules_agree_on_the_reference_minibatch(rule):
    assert at_8k(minibatch=256, lr_rule=rule).peak == 0.1


def test_a_wrong_ramp_is_noticed_by_the_loop():
    class Late(recipe.Schedule):
        def __call__(self, t: int) -> float:
            return super().__call__(t - 1)

    optimizer = par.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    late = Late(0.1, 3.2, 10, (), 100)
    with pytest.raises(RuntimeError, match="warmup is wrong"):
        recipe.set_lr(optimizer, late, 10)


def test_a_warmup_longer_than_the_first_drop_is_refused():
    with pytest.raises(par.UsageError, match="--warmup-epochs: given 5"):
        recipe.make_schedule(
            minibatch=512,
            steps_per_epoch=10,
            epochs=9,
            reference_lr=0.1,
            reference_minibatch=256,
            warmup_epochs=5,
            drops=PAPER_DROPS,
        )


def test_a_run_is_scored_by_the_median_of_its_last_five_epochs():
    assert recipe.median_error([9, 9, 5, 1, 4, 2, 3]) == 3
    assert recipe.median_error([2, 1]) == 1.5


# Test 8, Remark 4: one permutation per epoch, shared by all workers.


def sets_of_epoch(epoch: int, k: int, kn: int, count: int) -> list[list[set[int]]]:
    """The ids that each of k workers sees in each iteration."""
    permutation = data.permutation(0, epoch, count)
    return [
        [set(data.part(permutation, step, kn, rank, k).tolist()) for rank in range(k)]
        for step in range(data.steps_per_epoch(count, kn))
    ]


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_workers_share_one_epoch_without_overlap(k):
    seen = [i for parts in sets_of_epoch(0, k, 64, 640) for part in parts for i in part]
    assert sorted(seen) == list(range(640))


def test_the_last_partial_minibatch_is_left_out():
    seen = [i for parts in sets_of_epoch(0, 4, 64, 700) for part in parts for i in part]
    assert len(seen) == len(set(seen)) == 640


def test_minibatches_are_the_same_sets_for_every_number_of_workers():
    expected = [set.union(*parts) for parts in sets_of_epoch(0, 1, 64, 640)]
    for k in (2, 4, 8):
        assert [set.union(*parts) for parts in sets_of_epoch(0, k, 64, 640)] == expected
    # ... which says something: another epoch, and another seed, have other sets.
    assert [set.union(*parts) for parts in sets_of_epoch(1, 1, 64, 640)] != expected
    assert data.permutation(1, 0, 640).tolist() != data.permutation(0, 0, 640).tolist()


def test_workers_with_permutations_of_their_own_would_miss_images():
    seen = {
        int(i)
        for rank in range(4)
        for step in range(10)
        for i in data.part(data.permutation(rank, 0, 640), step, 64, rank, 4)
    }
    assert len(seen) < 640


def test_resuming_inside_an_epoch_replays_nothing():
    train = data.digits().train
    settings = {"seed": 5, "epoch": 2, "workers": [1], "k": 2, "batch_size": 32}
    whole = list(data.batches(train, **settings, steps=range(22)))
    tail = list(data.batches(train, **settings, steps=range(9, 22)))
    assert len(tail) == 13
    for (a, x), (b, y) in zip(whole[9:], tail, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)

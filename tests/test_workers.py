"""Logical workers on fewer processes equal as many processes (PAPER tests 2 and 26), in the whole trainer.

70 images and kn = 32: every third minibatch has 6 images, which is less than one worker's 8.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import pyallreduce as par
from ranks import run_ranks
from train import data, loop, models, recipe, rundir
from train.__main__ import main
from train.config import Config, load_preset
from train.evaluate import Evaluator
from train.metrics import read_metrics
from train.precision import Precision
from train.watch import Watch
from train.workers import minibatches

COUNT, N, K = 70, 8, 4
EPOCHS = 10
TINY = functools.partial(models.SmallResNet, 1, (8, 16), 1)


def dataset() -> data.Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(COUNT + 20, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = (pixels.mean((1, 2, 3)) > 0).long() + 2 * (pixels[:, 0, 0, 0] > 0).long()
    parts = (slice(COUNT), slice(COUNT, None))
    images = (data.Images(pixels[part], labels[part]) for part in parts)
    return data.Dataset(*images, num_classes=4, shape=(1, 8, 8), description="", fingerprint="")


def config(**values: Any) -> Config:
    small = {"model": "tiny", "epochs": EPOCHS, "batch_size": N, "reference_minibatch": 16}
    fixed = {"drop_last": False, "report": False}
    return Config(**{**load_preset("digits"), **fixed, **small, **values})


def train_in_float64(comm: par.Communicator, cfg: Config) -> tuple[dict[str, Tensor], Any, Any]:
    """Worker 0's model, its file of metrics, and the summary."""
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", TINY)
        patch.setattr(data, "load", lambda *_: dataset())
        summary = loop.train(cfg, comm)
    if comm.rank:
        return {}, [], summary
    run = Path(summary["directory"])
    model = torch.load(rundir.checkpoint_files(run)[0], weights_only=True)["model"]
    return model, read_metrics(run / "metrics.jsonl"), summary


# How many processes, and what else differs.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "4": (4, {}),
    "1": (1, {"virtual_workers": K}),
    "2": (2, {"minibatch": K * N}),
    "3": (3, {"minibatch": K * N, "virtual_workers": K}),  # one process has two workers
    "2 eager": (2, {"minibatch": K * N, "update": "eager"}),
    "2 recomputed": (2, {"minibatch": K * N, "bn_statistics": "recomputed", "bn_images": 70}),
    "3 recomputed": (3, {"minibatch": K * N, "bn_statistics": "recomputed", "bn_images": 70}),
    "1 absorbed": (1, {"virtual_workers": K, "momentum_form": "absorbed"}),
    "1 whole": (1, {"batch_size": K * N}),
}
# What a flag changes must change the weights.
OTHERS: dict[str, dict[str, Any]] = {
    "drop_last": {"drop_last": True},
    "momentum_correction": {"momentum_form": "absorbed", "momentum_correction": False},
    "nesterov": {"nesterov": False},
    "zero_gamma": {"zero_gamma": False},
    "label_smoothing": {"label_smoothing": 0.1},
    "sqrt": {"lr_rule": "sqrt"},
    "fixed": {"lr_rule": "fixed"},
    "constant": {"warmup": "constant"},
    "none": {"warmup": "none"},
}
RUNS |= {name: (1, {"virtual_workers": K, **values}) for name, values in OTHERS.items()}


def all_runs(rank: int, size: int, port: int, output: str) -> dict[str, Any]:
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    results = {}
    for name, (processes, values) in RUNS.items():
        if rank < processes:
            group = torch.distributed.PrefixStore(name, store)
            comm = par.init(store=group, rank=rank, size=processes)
            cfg = config(**values, output_dir=output, name=name)
            results[name] = train_in_float64(comm, cfg)
            comm.barrier()
            comm.close()
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("runs")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return run_ranks(4, all_runs, store.port, str(output), deadline_s=150)[0]


@functools.cache
def accumulate() -> tuple[dict[str, Tensor], list[float]]:
    """The same by stock torch, step by step: k groups of n images, statistics from the first.

    Returns the model's state and the mean loss of every epoch.
    """
    train = dataset().train
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = TINY(4)
        recipe.initialise(model)
    finally:
        torch.set_default_dtype(torch.float32)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    groups = recipe.parameter_groups(model, 1e-4)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    sums = [0.0] * EPOCHS
    # lr 0.05 for 16 images; kn is twice that, so a ramp in the first of ten epochs of 3 steps.
    for t in range(3 * EPOCHS):
        rate = 0.05 + 0.05 * t / 3 if t < 3 else 0.1 * 0.1 ** sum(t >= d for d in (9, 21, 27))
        for group in optimizer.param_groups:
            group["lr"] = rate
        order = data.permutation(0, t // 3, COUNT)
        ids = torch.from_numpy(order[t % 3 * 32 :][:32])
        shares = [ids[worker::K] for worker in range(K)] if len(ids) == 32 else [ids]
        optimizer.zero_grad()
        for index, share in enumerate(shares):
            for norm in norms:
                norm.momentum = 0.0 if index else 0.1
            loss = nnf.cross_entropy(model(train.pixels[share]), train.labels[share])
            (loss * len(share) / len(ids)).backward()
            sums[t // 3] += loss.item() * len(share)
        optimizer.step()
    return model.state_dict(), [total / COUNT for total in sums]


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor], statistics: bool) -> float:
    """Largest relative difference over the parameters, or over the running statistics."""
    keys = [k for k in ours if ("running_" in k) == statistics and "num_batches" not in k]
    a, b = (torch.cat([state[k].flatten() for k in keys]) for state in (ours, theirs))
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.deadline(200)
@pytest.mark.parametrize("name", ["4", "1", "2", "3", "2 eager", "2 recomputed", "1 absorbed"])
def test_workers_equal_accumulation_however_many_processes_they_have(runs, name):
    expected, _ = accumulate()
    assert gap(runs[name][0], expected, statistics=False) <= 1e-12
    assert gap(runs[name][0], expected, statistics=True) <= 1e-12


@pytest.mark.parametrize("name", ["1 whole", *OTHERS])
def test_another_recipe_trains_something_else(runs, name):
    assert gap(runs[name][0], runs["1"][0], statistics=False) > 1e-3


def test_running_averages_move_once_per_iteration(runs):
    for name in ("4", "1", "2", "3"):
        assert runs[name][0]["bn1.num_batches_tracked"] == 3 * EPOCHS


def test_metrics_do_not_depend_on_the_processes(runs):
    epochs = {
        name: [r for r in runs[name][1] if r["kind"] == "epoch"] for name in ("4", "1", "2", "3")
    }
    expected = pytest.approx(accumulate()[1], rel=1e-9)
    assert [epoch["train_loss"] for epoch in epochs["4"]] == expected
    for name in ("1", "2", "3"):
        for ours, theirs in zip(epochs[name], epochs["4"], strict=True):
            assert ours["train_images"] == theirs["train_images"] == COUNT
            for key in ("train_loss", "train_error", "test_error", "test_loss", "lr"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-9)


def test_dropped_images_are_not_seen(runs):
    epochs = [r for r in runs["drop_last"][1] if r["kind"] == "epoch"]
    assert [r["train_images"] for r in epochs] == [64] * EPOCHS


def test_statistics_are_named(runs):
    records = {name: [r for r in runs[name][1] if "bn_statistics" in r] for name in RUNS}
    assert {r["bn_statistics"] for r in records["2"]} == {"worker 0's running statistics"}
    assert {r["bn_statistics"] for r in records["2 recomputed"]} == {
        "statistics recomputed over 64 training images, 8 at a time"
    }


def test_recomputed_statistics_do_not_depend_on_the_processes(runs):
    losses = [
        [r["test_loss"] for r in runs[name][1] if r["kind"] == "epoch"]
        for name in ("2", "2 recomputed", "3 recomputed")
    ]
    assert losses[1] == pytest.approx(losses[2], rel=1e-9)
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)
    # Worker 0's lag behind at first: it has seen three minibatches when the first epoch ends.
    assert losses[1][0] < losses[0][0]


@pytest.mark.parametrize("name", ["2", "2 recomputed"])
def test_the_export_has_the_statistics_that_were_evaluated(runs, tmp_path, name):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    file = tmp_path / "weights.safetensors"
    assert main(["export", runs[name][2]["directory"], "--out", str(file)]) == 0
    model = TINY(4).double().eval()
    model.load_state_dict(safetensors.load_file(file))
    test = dataset().test
    with torch.no_grad():
        loss = nnf.cross_entropy(model(test.pixels), test.labels).item()
    *_, epoch = (r for r in runs[name][1] if r["kind"] == "epoch")
    assert loss == pytest.approx(epoch["test_loss"], rel=1e-9)


# The parts.


class Alone:
    rank, size = 0, 1

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> None: ...


def test_recomputed_statistics_are_means_over_batches():
    """Of a network that is one batch norm, so that its input's moments are known."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    batches = [(torch.randn(n, 3, 4, 4) * (n + 1), torch.zeros(n)) for n in (8, 8, 5)]
    test = data.Images(torch.randn(6, 3, 4, 4), torch.zeros(6, dtype=torch.int64))
    precision = Precision(config(), torch.device("cpu"))
    evaluator = Evaluator(model, Alone(), test, precision, Watch(Alone()))
    named = evaluator(model, iter(batches)).statistics
    assert named == "statistics recomputed over 21 training images, 7 at a time"
    norm = evaluator._copy[0]
    mean = torch.stack([x.mean((0, 2, 3)) for x, _ in batches]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x, _ in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.1
    assert not norm.training
    assert (model[0].running_mean == 0).all()


class Turns:
    """Stands for an aggregator: says in which backwards it would aggregate."""

    syncs = True

    def no_sync(self) -> Any:
        class Off:
            def __enter__(_) -> None:  # noqa: N805
                self.syncs = False

            def __exit__(_, *args: Any) -> None:  # noqa: N805
                self.syncs = True

        return Off()


def test_only_the_last_worker_of_a_process_aggregates_and_only_the_first_moves_averages():
    model, turns = nn.BatchNorm1d(2), Turns()
    source = iter([(torch.zeros(2, 2), torch.zeros(2))] * 6)
    seen = [
        [(turns.syncs, model.track_running_stats) for _ in minibatch]
        for minibatch in minibatches([4, 4], source, [1, 3, 5], model, turns)
    ]
    assert seen == [[(False, True), (False, False), (True, False)]] * 2
    assert turns.syncs
    assert model.track_running_stats


def test_a_missing_batch_is_an_error():
    source = iter([(torch.zeros(2, 2), torch.zeros(2))])
    (minibatch,) = minibatches([4], source, [0, 1], nn.BatchNorm1d(2), Turns())
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(minibatch)


@pytest.mark.parametrize("count", range(1, 33))
def test_a_small_last_minibatch_goes_to_as_few_workers_as_can_take_it(count):
    order = data.permutation(0, 0, 64 + count)
    shares = [data.part(order, 2, 32, worker, 4).tolist() for worker in range(4)]
    assert sorted(i for share in shares for i in share) == sorted(order[64:].tolist())
    sizes = [len(share) for share in shares if share]
    assert len(sizes) == -(-count // 8)
    assert max(sizes) - min(sizes) <= 1
    assert shares[0]


def test_an_epoch_keeps_or_drops_its_rest():
    assert data.steps_per_epoch(70, 32) == 2
    assert data.steps_per_epoch(70, 32, drop_last=False) == 3
    assert data.steps_per_epoch(64, 32, drop_last=False) == 2


@pytest.mark.parametrize("kn", [256 << i for i in range(9)])  # 256 ... 64k
def test_workers_follow_from_the_minibatch(kn):
    assert recipe.number_of_workers(32, kn, None, processes=8) == kn // 32
    assert recipe.number_of_workers(32, None, kn // 32, processes=1) == kn // 32
    assert recipe.number_of_workers(32, None, None, processes=kn // 32) == kn // 32


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((32, 100, None, 1), "accepted: a multiple of the 32 images per worker, such as 96"),
        ((32, 8, None, 1), "such as 32"),
        ((32, 256, 4, 1), "given 4, but --minibatch 256 with 32 images per worker needs 8"),
        ((32, 256, None, 9), "--minibatch: 8 workers of 32 images for 9 processes"),
        ((32, None, 3, 4), "--virtual-workers: 3 workers of 32 images for 4 processes"),
    ],
)
def test_impossible_numbers_of_workers_are_refused(asked, message):
    with pytest.raises(par.UsageError, match=message):
        recipe.number_of_workers(*asked)

"""Pages about runs: what they show is what the records say, and they stand alone."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import pyallreduce as par
from train import compare, page, report
from train.__main__ import main
from train.config import Config, load_preset
from train.metrics import SPLIT, MetricsFile
from train.records import Records

plots = pytest.importorskip("train.plots", reason="matplotlib is not installed: no pictures")
compare_plots = pytest.importorskip("train.compare_plots", reason="matplotlib is missing")
image_of = pytest.importorskip("PIL.Image", reason="Pillow is not installed").open

EPOCHS, PER_EPOCH, RANKS = 8, 10, 2
ENVIRONMENT = {
    "command": "python -m train classify --name 'a<b>'",
    "ranks": RANKS,
    "cores": 2,
    "cpu": "a CPU",
    "packages": {"torch": "2", "rich": None},
}
BUCKET = {"bytes": 4096, "params": ["w"], "enqueued_s": 0.012, "used_s": 0.03}
TIMELINE = {
    "iteration": 33,
    "window_s": 0.04,
    "compute_s": 0.03,
    "comm_busy_s": 0.02,
    "exposed_comm_s": 0.005,
    "overlap_ratio": 0.75,
    "buckets": [
        {**BUCKET, "index": 0, "ready_s": 0.012, "start_s": 0.013, "end_s": 0.020},
        {**BUCKET, "index": 1, "ready_s": 0.020, "start_s": 0.022, "end_s": 0.035},
    ],
    "phases": [
        {"name": "forward", "start_s": 0.0, "end_s": 0.01},
        {"name": "backward", "start_s": 0.01, "end_s": 0.03},
        {"name": "wait", "start_s": 0.03, "end_s": 0.035},
        {"name": "update", "start_s": 0.036, "end_s": 0.04},
    ],
}


def make_run(
    path: Path,
    errors: list[float],
    *,
    ending: str | None = "summary",
    top5: float | None = None,
    **values: Any,
) -> Path:
    """A run directory with these held-out errors by epoch; `ending` is the kind of its last record.

    `top5` is the top-5 error of all epochs.
    """
    path.mkdir(parents=True)
    config = Config(**{**load_preset("digits"), "epochs": EPOCHS, **values})
    derived = {
        "processes": RANKS,
        "minibatch": RANKS * config.batch_size,
        "iterations_per_epoch": PER_EPOCH,
        "schedule": {
            "start": 0.05,
            "peak": 0.1,
            "warmup": PER_EPOCH,
            "drops": [4 * PER_EPOCH],
            "total": EPOCHS * PER_EPOCH,
        },
    }
    (path / "config.json").write_text(json.dumps({**config.to_json(), "derived": derived}))
    (path / "env.json").write_text(json.dumps(ENVIRONMENT))
    (path / "timeline.json").write_text(json.dumps(TIMELINE))
    log = MetricsFile(path / "metrics.jsonl", 0)
    parts = dict(zip(SPLIT, (30.0, 5.0, 1.0, 2.0), strict=True))
    for epoch, error in enumerate(errors):
        for step in (epoch * PER_EPOCH + 5, (epoch + 1) * PER_EPOCH):
            log.write(
                "step",
                step=step,
                epoch=epoch,
                lr=0.1,
                loss=2.0 / step,
                images_per_s=1500.0,
                compute_images_per_s=1600.0,
                skew_ms=[0.0, 3.0],
                **parts,
            )
        log.write(
            "epoch",
            step=(epoch + 1) * PER_EPOCH,
            epoch=epoch,
            lr=0.1,
            train_loss=1.0 / (epoch + 1),
            train_error=error + 1,
            images_per_s=1500.0,
            per_rank={**{k: [v, v] for k, v in parts.items()}, "overlap_ratio": [0.75, None]},
            test_error=error,
            **({} if top5 is None else {"test_error_top5": top5}),
            test_loss=0.5,
            test_images=364,
            bn_statistics="worker 0's running statistics",
        )
    last = len(errors) * PER_EPOCH
    if ending == "summary":
        communication = {"iterations": 60, "overlap_ratio": 0.75, "exposed_ms": 5.0}
        communication |= {"exposed_ms_p10": 4.0, "exposed_ms_p90": 6.0, "busy_ms": 20.0}
        throughput = {"images_per_s": 1500.0, "images_per_s_end_to_end": 1400.0}
        rest = {"throughput": throughput, "communication": communication, "seconds": 8.0}
        log.write("summary", step=last, **rest)
    elif ending == "stopped":
        log.write("stopped", step=last, reason="PeerError: rank 1 <died>")
    log.close()
    return path


class Page(HTMLParser):
    """The texts, tables and images of a page; every tag must be closed where it should be."""

    ALONE = ("meta", "img", "link", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[bytes] = []
        self.alternatives: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.addresses: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.ALONE:
            self._open.append(tag)
        given = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "data") and v]
        if tag == "img":
            head, data = (given["src"] or "").split(",", 1)
            assert head == "data:image/png;base64"
            self.images.append(base64.b64decode(data, validate=True))
            self.alternatives.append(given["alt"] or "")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def read(path: Path) -> Page:
    """The page at `path`, which needs nothing but itself."""
    html = path.read_text(encoding="utf-8")
    found = Page(html)
    assert all(address.startswith("data:") for address in found.addresses)
    assert not re.search(r"<script|@import|url\(|https?:", html)
    for image in found.images:
        image_of(io.BytesIO(image)).verify()
    return found


def column(table: list[list[str]], name: str) -> list[str]:
    return [row[table[0].index(name)] for row in table[1:]]


def test_report_shows_what_the_records_say(tmp_path):
    run = make_run(tmp_path / "run", [50, 9, 5, 1, 4, 2, 3, 2.5])
    assert report.write(run) == ""
    found = read(run / "report.html")
    assert len(found.images) == len(found.alternatives) == 4
    assert all(found.alternatives)
    assert "Finished all 8 epochs." in found.text
    assert "held-out error2.50 %median of the last 5 epochs" in found.text  # of 1, 4, 2, 3, 2.5
    epochs = next(t for t in found.tables if t[0][0] == "epoch")
    assert column(epochs, "held-out error %") == [f"{e:.2f}" for e in (50, 9, 5, 1, 4, 2, 3, 2.5)]
    assert ["batch_size", "32"] in [row for table in found.tables for row in table]
    assert ["packages.torch", "2"] in [row for table in found.tables for row in table]
    assert "--name 'a<b>'" in found.text  # escaped, else it would be a tag


@pytest.mark.parametrize(("top5", "column_of_timm"), [(1.25, "98.75"), (None, "")])
def test_report_and_summary_have_the_top5_error_where_there_is_one(tmp_path, top5, column_of_timm):
    run = make_run(tmp_path / "run", [9, 5], top5=top5)
    report.write_summary(Records.read(run))
    with (run / report.SUMMARY).open(newline="") as file:
        assert [row["eval_top5"] for row in csv.DictReader(file)] == [column_of_timm] * 2
    shown = [row for row in report.results(Records.read(run)) if "top-5" in row[0]]
    assert [value for _, value, _ in shown] == (["1.25 %"] if top5 else [])


def test_a_run_that_stopped_early_has_a_report_that_says_so(tmp_path, capsys):
    run = make_run(tmp_path / "run", [50, 9, 5], ending="stopped")
    assert main(["report", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    found = read(run / "report.html")
    assert "Stopped early at iteration 30 of 80: PeerError: rank 1 <died>." in found.text
    assert len(found.images) == 4
    assert len(next(t for t in found.tables if t[0][0] == "epoch")) == 1 + 3


@pytest.mark.parametrize(
    ("errors", "ending", "status"),
    [
        ([50, 9, 5], "summary", "ended as asked for, at iteration 30 of 80"),
        ([50, 9, 5], None, "running, or killed: at iteration 30 of 80"),
        ([50] * EPOCHS, "summary", "finished all 8 epochs"),
        ([50] * EPOCHS, "stopped", "stopped early at iteration 80 of 80: PeerError: rank 1 <died>"),
    ],
)
def test_status(tmp_path, errors, ending, status):
    assert Records.read(make_run(tmp_path / "run", errors, ending=ending)).status == status


def test_a_run_that_was_resumed_is_no_longer_stopped(tmp_path):
    run = make_run(tmp_path / "run", [50, 9, 5], ending="stopped")
    log = MetricsFile(run / "metrics.jsonl", 30)
    log.write("step", step=35)
    log.close()
    assert Records.read(run).status == "running, or killed: at iteration 35 of 80"


def test_a_run_killed_before_its_first_line_has_a_report(tmp_path):
    run = make_run(tmp_path / "run", [], ending=None)
    (run / "timeline.json").unlink()
    report.write(run)
    assert "at iteration 0 of 80" in read(run / "report.html").text


def test_one_process_has_no_picture_of_ranks(tmp_path):
    run = make_run(tmp_path / "run", [50, 9])
    records = Records.read(run)
    assert sorted(plots.of_run(records)) == ["curves", "ranks", "speed", "timeline"]
    records.derived["processes"] = 1
    assert sorted(plots.of_run(records)) == ["curves", "speed", "timeline"]


def test_a_loss_that_was_not_finite_leaves_a_gap(tmp_path):
    run = make_run(tmp_path / "run", [50, 9])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    first = {**json.loads(lines[0]), "loss": None}
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    assert plots.png(plots.curves(Records.read(run)))


def test_a_resumed_process_that_only_evaluated_has_a_report(tmp_path):
    """It measured no iteration: neither its epoch nor its summary has speeds."""
    run = make_run(tmp_path / "run", [50, 9, 5])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("per_rank", "images_per_s"):
        del records[-2][name]
    records[-1] |= {"throughput": None, "communication": None}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert report.write(run) == ""
    found = read(run / "report.html")
    epochs = next(t for t in found.tables if t[0][0] == "epoch")
    assert column(epochs, "images/s") == ["1,500", "1,500", "–"]
    compare.write([run], [], tmp_path / "page.html")
    assert column(read(tmp_path / "page.html").tables[0], "images/s") == ["–"]


def test_without_matplotlib_the_report_has_no_pictures(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [50, 9])
    monkeypatch.delattr("train.plots")
    monkeypatch.setitem(sys.modules, "train.plots", None)
    assert "pip install 'pyallreduce[train]'" in report.write(run)
    found = read(run / "report.html")
    assert found.images == []
    assert "held-out error" in found.text


@pytest.mark.parametrize("missing", ["config.json", "env.json"])
def test_another_directory_is_refused(tmp_path, capsys, missing):
    run = make_run(tmp_path / "run", [50])
    (run / missing).unlink()
    assert main(["report", str(run)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_a_run_of_another_version_is_refused(tmp_path):
    run = make_run(tmp_path / "run", [50])
    config = json.loads((run / "config.json").read_text())
    config["derived"]["schedule"]["unheard_of"] = 1
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(par.UsageError, match="of this version"):
        Records.read(run)


def test_tables_escape_what_they_show():
    found = Page(page.page("<t>", [page.table(("a", "b"), [("<i>", None), ("&", 1.5)])]))
    assert found.tables == [[["a", "b"], ["<i>", "–"], ["&", "1.5"]]]


# Comparisons.

CURVE = [50, 9, 5, 3, 2, 2, 2]  # and the last epoch


@pytest.fixture
def three_groups(tmp_path) -> Path:
    """Three seeds of the baseline, two of a larger minibatch, one run that stopped early."""
    for seed, last in enumerate((1.0, 2.0, 3.0)):
        # Medians of the last five epochs: 2 in all, so the deviation must come from them, not `last`.
        make_run(tmp_path / f"base-{seed}", [*CURVE, last], seed=seed)
    for seed, error in enumerate((4.0, 5.0)):
        make_run(tmp_path / f"large-{seed}", [50, 9, *[error] * 6], seed=seed, lr=0.2)
    make_run(tmp_path / "short", [60.0, 30.0], lr=0.4, ending="stopped")
    return tmp_path


def test_compare_groups_runs_by_all_but_the_seed(three_groups, capsys):
    out = three_groups / "page.html"
    base = three_groups / "base-1"
    assert main(["compare", str(three_groups), "--baseline", str(base), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    found = read(out)
    assert len(found.images) == 4
    assert "Comparison of 6 runs" in found.text
    table = found.tables[0]
    assert column(table, "group") == ["baseline: lr 0.05", "lr 0.2", "lr 0.4"]
    assert column(table, "runs") == ["3", "2", "1"]
    assert column(table, "final error %") == ["2.00 ± 0.00", "4.50 ± 0.71", "–"]
    assert column(table, "difference to baseline") == ["–", "+2.50", "–"]
    assert "lr 0.4: 1 of 1 runs not counted" in found.text
    runs = next(t for t in found.tables if t[0][0] == "run")
    assert column(runs, "run") == ["base-0", "base-1", "base-2", "large-0", "large-1", "short"]


def test_compare_gives_its_numbers_to_programs(three_groups, capsys):
    base, out = three_groups / "base-1", three_groups / "page.html"
    flags = ["--baseline", str(base), "--out", str(out), "--json"]
    assert main(["compare", str(three_groups), *flags]) == 0
    first, second, third = json.loads(capsys.readouterr().out)["groups"]
    assert out.exists()
    assert [g["label"] for g in (first, second, third)] == ["lr 0.05", "lr 0.2", "lr 0.4"]
    assert [g["is_baseline"] for g in (first, second, third)] == [True, False, False]
    assert [g["error"] for g in (first, second, third)] == [2.0, 4.5, None]
    assert second["deviation"] == pytest.approx(0.5**0.5)
    assert [(r["seed"], r["error"], r["train_error"]) for r in second["runs"]] == [
        (0, 4.0, 5.0),
        (1, 5.0, 6.0),
    ]
    assert [r["error"] for r in third["runs"]] == [None]  # it has not all its epochs
    assert first["runs"][0]["command"] == ENVIRONMENT["command"]


def test_differences_are_in_deviations_of_the_baseline(tmp_path):
    runs = [
        make_run(tmp_path / f"{lr}-{seed}", [50.0, *[error] * 7], seed=seed, lr=lr)
        for lr, errors in ((0.1, (1.0, 2.0, 3.0)), (0.2, (4.0, 5.0, 6.0)))
        for seed, error in enumerate(errors)
    ]
    first, second = compare.groups([Records.read(run) for run in runs], [runs[0]])
    assert (first.mean, first.deviation) == (2.0, 1.0)
    assert compare.difference(second, first) == "+3.00 (3.0 σ)"
    assert compare.difference(first, second) == "-3.00 (3.0 σ)"


def drawn_band(group: compare.Group) -> tuple[list[float], list[tuple[float, float]]]:
    """The mean line's values, and the corners of the band."""
    _, (axes, _) = plots.grid(1, 2)
    (style,) = compare_plots.styles([group])
    compare_plots.band(axes, group, lambda run: compare_plots.by_epoch(run, "test_error"), style)
    (line,), (band,) = axes.get_lines(), axes.collections
    return line.get_ydata().tolist(), band.get_paths()[0].vertices.tolist()


def test_the_band_is_between_the_lowest_and_the_highest_run(three_groups):
    runs = [Records.read(three_groups / f"base-{seed}") for seed in range(3)]
    (group,) = compare.groups(runs, [])
    line, corners = drawn_band(group)
    assert line == [*CURVE, 2.0]  # 2 is the mean of 1, 2 and 3
    ends = [y for x, y in corners if x == EPOCHS]
    assert (min(ends), max(ends)) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [((8, 8, 3), [8.0] * 8), ((5, 4), [8.0] * 4)],  # the whole runs; where there are none, all
)
def test_a_run_that_ended_early_does_not_shorten_the_others(tmp_path, lengths, expected):
    for seed, (error, length) in enumerate(zip((9.0, 7.0, 1.0), lengths, strict=False)):
        make_run(tmp_path / str(seed), [error] * length, seed=seed)
    (group,) = compare.groups([Records.read(run) for run in sorted(tmp_path.iterdir())], [])
    assert drawn_band(group)[0] == expected


def test_repeated_seeds_are_remarked(tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name, [9.0] * 8)
    found = compare.groups([Records.read(tmp_path / name) for name in ("a", "b")], [])
    assert "not independent" in "".join(compare.remarks(found))


def test_where_and_how_a_run_was_started_makes_no_group(tmp_path):
    runs = [
        make_run(tmp_path / "a", [9.0] * 8, name="a", print_freq=5, output_dir="x"),
        make_run(tmp_path / "b", [9.0] * 8, name="b", seed=1, timeout_s=5.0),
        make_run(tmp_path / "c", [9.0] * 8, seed=2, momentum=0.8),
    ]
    found = compare.groups([Records.read(run) for run in runs], [])
    assert [group.label for group in found] == ["momentum 0.9", "momentum 0.8"]
    assert [len(group.runs) for group in found] == [2, 1]


def test_long_labels_stay_in_the_picture(tmp_path):
    """Groups that differ in much: three columns of such labels are wider than the figure."""
    for i in range(4):
        values = {"virtual_workers": i + 1, "lr": 0.01 * (i + 1), "momentum": 0.1 * (i + 1)}
        make_run(tmp_path / str(i), [9.0] * 8, **values, warmup_epochs=i, weight_decay=0.1 * i)
    found = compare.groups([Records.read(run) for run in sorted(tmp_path.iterdir())], [])
    for figure, _ in compare_plots.of_groups(found)[:3]:
        plots.png(figure)
        (legend,) = figure.legends
        assert len(legend.get_texts()) == 4
        assert legend.get_window_extent().x0 >= 0
        assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_groups_differ_in_more_than_colour(three_groups):
    found = compare.groups([Records.read(p.parent) for p in three_groups.glob("*/config.json")], [])
    looks = compare_plots.styles(found)
    for name in ("color", "linestyle", "marker"):
        assert len({str(look[name]) for look in looks}) == len(found) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["none"], "none is neither a run directory"), (["a", "--out", "none/x"], "--out: none/x")],
)
def test_compare_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", [9.0] * 8)
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err

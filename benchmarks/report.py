"""The tables that come of a run: the bars of one host, then all figures behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import overlap
from benchmarks.harness import Book, Record, markdown, size_name, time_name
from benchmarks.training import NO_COMMUNICATION

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Verdict:
    """One bar against one figure: as text, and whether it is met; None where there is nothing to compare with."""

    bar: str
    found: str = "-"
    met: bool | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured, our figure, its verdicts."""

    what: str
    figure: str
    verdicts: list[Verdict]
    note: str = ""

    def cells(self) -> list[str]:
        open_bars = [v.bar for v in self.verdicts if v.met is None]
        missed = [v.bar for v in self.verdicts if v.met is False]
        if len(open_bars) == len(self.verdicts):
            met = self.note or "not measured"
        elif missed:
            met = f"no: {'; '.join(missed)}"
        else:
            met = f"yes; not measured: {'; '.join(open_bars)}" if open_bars else "yes"
        bars = "; ".join(v.bar for v in self.verdicts)
        return [self.what, bars, self.figure, "; ".join(v.found for v in self.verdicts), met]


# --- bars ------------------------------------------------------------------------------------------------------------


def _best(record: Record, names: tuple[str, ...]) -> tuple[str, float] | None:
    """The fastest of these methods, and its median in us; None if none of them was measured."""
    times = {n: record["methods"][n]["median_us"] for n in names if n in record["methods"]}
    return min(times.items(), key=lambda item: item[1]) if times else None


@dataclass(frozen=True)
class FasterThan:
    """Our time is at most 1/factor of the best peer's."""

    factor: float
    peers: tuple[str, ...]
    label: str

    @property
    def bar(self) -> str:
        return f">= {self.factor:g} x {self.label}"

    def judge(self, record: Record, ours_us: float) -> Verdict:
        best = _best(record, self.peers)
        if best is None:
            return Verdict(self.bar)
        ratio = best[1] / ours_us
        return Verdict(self.bar, f"{ratio:.1f} x {best[0]}", ratio >= self.factor)


@dataclass(frozen=True)
class NearFloor:
    """Our time is at most ``factor`` times the floor's."""

    factor: float
    floors: tuple[str, ...]

    @property
    def bar(self) -> str:
        return f"<= {self.factor:g} x floor"

    def judge(self, record: Record, ours_us: float) -> Verdict:
        best = _best(record, self.floors)
        if best is None:
            return Verdict(self.bar)
        ratio = ours_us / best[1]
        return Verdict(self.bar, f"{ratio:.2f} x floor", ratio <= self.factor)


@dataclass(frozen=True)
class AtMost:
    limit_us: float

    @property
    def bar(self) -> str:
        return f"<= {time_name(self.limit_us)}"

    def judge(self, record: Record, ours_us: float) -> Verdict:
        share = ours_us / self.limit_us
        return Verdict(self.bar, f"{share:.2f} of it", share <= 1)


Check = FasterThan | NearFloor | AtMost
SHARED, PRIVATE = ("floor",), ("floor, staged", "floor, readv")
GLOO, MPIS = ("gloo",), ("mpich", "openmpi")


@dataclass(frozen=True)
class Bar:
    """A row of the issue's table about collectives."""

    what: str
    case: dict[str, Any]
    method: str
    floors: tuple[str, ...]
    checks: tuple[Check, ...]
    benchmark: str = "all_reduce"

    def row(self, book: Book) -> Row:
        record = book.find(self.benchmark, **self.case)
        if record is None or self.method not in record["methods"]:
            return Row(self.what, "-", [Verdict(check.bar) for check in self.checks])
        ours_us = record["methods"][self.method]["median_us"]
        floor = _best(record, self.floors)
        figure = time_name(ours_us) + (f" (floor {time_name(floor[1])})" if floor else "")
        return Row(self.what, figure, [check.judge(record, ours_us) for check in self.checks])


def _of(ranks: int, nbytes: int, cache: str = "hot") -> dict[str, Any]:
    return {"ranks": ranks, "bytes": nbytes, "cache": cache}


def _symmetric(nbytes: int, ranks: int, cache: str, gloo: float, mpi: float, floor: float) -> Bar:
    return Bar(
        f"all_reduce, symmetric, {size_name(nbytes)}, {ranks} ranks, {cache}",
        _of(ranks, nbytes, cache),
        "symmetric",
        SHARED,
        (
            FasterThan(gloo, GLOO, "gloo"),
            FasterThan(mpi, MPIS, "best MPI"),
            NearFloor(floor, SHARED),
        ),
    )


def _python_call(ranks: int, cache: str, check: Check) -> Bar:
    """Hot: the slowest rank's time after a barrier. Where ranks outnumber the cores it contains that the others write
    and verify 4 KiB, so that peers in the same run are its only bar."""
    how = "after a barrier, slowest rank" if cache == "hot" else cache
    what = f"4 KiB, {ranks} ranks, whole Python call, symmetric, {how}"
    return Bar(what, _of(ranks, 4 * KIB, cache), "symmetric", SHARED, (check,))


def _core(ranks: int, nbytes: int, cache: str, check: Check) -> Bar:
    """Without Python; the floor runs on the same memory, in the same processes."""
    what = f"core alone, {size_name(nbytes)}, {ranks} ranks, {cache}"
    return Bar(what, _of(ranks, nbytes, cache), "core", SHARED, (check,), "core")


COLLECTIVE_BARS = [
    _symmetric(25 * MIB, 2, "hot", 16, 3.5, 1.2),
    _symmetric(25 * MIB, 2, "cold", 16, 3.5, 1.2),
    _symmetric(100 * MIB, 2, "hot", 8, 2.5, 1.2),
    _symmetric(100 * MIB, 2, "cold", 8, 2.5, 1.2),
    _symmetric(25 * MIB, 4, "hot", 10, 3.5, 1.3),
    *(
        _core(ranks, nbytes, cache, NearFloor(1.1, SHARED))
        for ranks in (2, 4)
        for nbytes, cache in ((25 * MIB, "hot"), (25 * MIB, "cold"), (100 * MIB, "hot"))
    ),
    Bar(
        "all_reduce, plain tensors, 25 MiB, 2 ranks, hot",
        _of(2, 25 * MIB),
        "plain",
        PRIVATE,
        (FasterThan(7, GLOO, "gloo"), FasterThan(1.3, MPIS, "best MPI")),
    ),
    Bar(
        "all_reduce, plain tensors, 25 MiB, 2 ranks, cold",
        _of(2, 25 * MIB, "cold"),
        "plain",
        PRIVATE,
        (FasterThan(5, GLOO, "gloo"),),
    ),
    _python_call(2, "back to back", AtMost(5)),
    _python_call(2, "hot", AtMost(5)),
    _core(2, 4 * KIB, "hot", AtMost(1.5)),
    _python_call(4, "back to back", AtMost(20)),
    _python_call(4, "hot", FasterThan(1, MPIS, "best MPI")),
]


def _step_row(book: Book, model: str, way: str, share: float, floor: str) -> Row:
    what = f"{model}, 64 px, 2 ranks: step - plain forward and backward, {way}"
    bar = f"<= 1/{round(1 / share)} of DDP (gloo) + torch.optim.SGD"
    record = book.find("step", model=model)
    if record is None or way not in record["methods"]:
        return Row(what, "-", [Verdict(bar)], record["missing"].get(way, "") if record else "")
    overhead = record["extra"]["overhead_us"]
    ratio = overhead[way] / overhead["DDP (gloo)"]
    found = f"{ratio:.2f}"
    if (fused := overhead.get("DDP (gloo), fused SGD")) is not None:
        found += f" ({overhead[way] / fused:.2f} of that with fused SGD)"
    floor_us = record["methods"][floor]["median_us"]
    figure = f"{time_name(overhead[way])} (floor {time_name(floor_us)})"
    return Row(what, figure, [Verdict(bar, found, ratio <= share)])


def _hook_rows(book: Book) -> Iterator[Row]:
    for record in book.select("hook"):
        us = {way: figures["median_us"] for way, figures in record["methods"].items()}
        ours = us["DDP + our hook"]
        shorter = record["extra"]["gain_us"] / us["DDP (gloo)"]
        least = 0.15 if record["model"] == "resnet50" else 0.0
        bar = "step >= 15 % shorter" if least else "never slower"
        what = f"DDP with our hook against DDP (gloo), {record['model']}"
        figure, found = time_name(ours), f"{shorter:.1%} shorter"
        if (floor := us.get(NO_COMMUNICATION)) is not None:  # older records lack it
            figure += f" (without communication {time_name(floor)})"
            found += f"; {ours / floor:.2f} x without communication"
        yield Row(what, figure, [Verdict(bar, found, shorter >= least)])


def _bookkeeping_row(book: Book) -> Row:
    what, bar = "bookkeeping: hooks, events, report", "<= 1 % of the ResNet-50 step"
    record, step = book.find("bookkeeping"), book.find("step", model="resnet50")
    if record is None or step is None:
        return Row(what, "-", [Verdict(bar)])
    spent_us = record["extra"]["hooks_us"] + record["extra"]["report_us"]
    share = spent_us / step["methods"]["plain"]["median_us"]
    return Row(what, time_name(spent_us), [Verdict(bar, f"{share:.2%}", share <= 0.01)])


def _drift_row(book: Book) -> Row:
    what, bar = "replica-drift sentinel, every 100 steps", "<= 0.1 % of the ResNet-50 step"
    record = book.find("drift", model="resnet50")
    if record is None:
        return Row(what, "-", [Verdict(bar)])
    spent_us, share = record["methods"]["check"]["median_us"], record["extra"]["share"]
    figure = f"{time_name(spent_us)} each time"
    return Row(what, figure, [Verdict(bar, f"{share:.3%}", share <= 0.001)])


FINGERPRINT_BAR = Bar(
    "header fingerprint, made and compared", {}, "fingerprint", (), (AtMost(0.1),), "fingerprint"
)


def rows_of(book: Book) -> list[Row]:
    steps = [
        _step_row(book, model, way, share, floor)
        for model in ("resnet50", "vgg11")
        for way, share, floor in (
            ("aggregator, eager", 1 / 4, "floor, one-pass"),
            ("aggregator, eager, shared", 1 / 6, "floor, shared"),
        )
    ]
    own = [_bookkeeping_row(book), _drift_row(book), FINGERPRINT_BAR.row(book)]
    return [*(bar.row(book) for bar in COLLECTIVE_BARS), *steps, *_hook_rows(book), *own]


# --- all figures -----------------------------------------------------------------------------------------------------


def _collectives(book: Book) -> list[str]:
    """The columns of nccl-tests from size to #wrong; before them the case, after them the quantile users ask for."""
    header = ["ranks", "cache", "method", "size (B)", "count", "type", "redop", "root"]
    header += ["time (us)", "algbw (GB/s)", "busbw (GB/s)", "#wrong", "p99 (us)"]
    rows = [
        [
            str(record["ranks"]),
            record["cache"],
            method,
            str(record["bytes"]),
            str(record["bytes"] // 4),
            record["dtype"],
            record["op"],
            "-1",
            f"{figures['median_us']:.2f}",
            f"{figures['algbw_gb_s']:.2f}",
            f"{figures['busbw_gb_s']:.2f}",
            str(figures["wrong"]),
            f"{figures['p99_us']:.2f}",
        ]
        for record in book.select("all_reduce")
        for method, figures in record["methods"].items()
    ]
    return markdown(header, rows)


def _steps(book: Book) -> list[str]:
    header = [
        "model",
        "way",
        "step",
        "step - plain",
        "forward",
        "backward",
        "update",
        "zero",
        "exposed, reported",
    ]
    rows = []
    for record in book.select("step"):
        extra = record["extra"]
        for way, phases in extra["phases_us"].items():
            exposed = extra["exposed_us"].get(way)
            rows.append(
                [
                    record["model"],
                    way,
                    time_name(record["methods"][way]["median_us"]),
                    f"{extra['overhead_us'][way] / 1e3:.1f} ms",
                    *(
                        time_name(phases[p]) if p in phases else "-"
                        for p in ("forward", "backward", "update", "zero")
                    ),
                    "-" if exposed is None else time_name(exposed),
                ]
            )
    return markdown(header, rows)


def _about(book: Book) -> list[str]:
    found = book.fresh[-1] if book.fresh else book.records[-1]
    machine = found["machine"]
    libraries = {
        library
        for record in book.records
        for library in record["extra"].get("libraries", {}).values()
    }
    absent = {name: why for record in book.records for name, why in record["missing"].items()}
    commits = sorted({record["machine"]["commit"] for record in book.records})
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['last_level_cache_bytes'] >> 20} MiB last-level cache, Linux {machine['kernel']}, "
        f"{machine['isa']}; {', '.join(sorted(libraries)) or 'torch ' + machine['torch']}.",
        f"Commit {', '.join(commits)}. Medians of the slowest rank's time over {found['blocks']} "
        "interleaved blocks; every result verified.",
    ]
    return lines + [f"**Not measured: {name}**: {why}" for name, why in sorted(absent.items())]


def markdown_of(book: Book) -> str:
    bars = markdown(
        ["what (float32)", "bar", "ours", "ratio", "met"], (row.cells() for row in rows_of(book))
    )
    parts = [["# Benchmarks of one host"], _about(book), bars]
    for title, benchmark, make in (
        ("All-reduce", "all_reduce", _collectives),
        ("Training steps", "step", _steps),
        ("Overlap", "overlap", overlap.table),
    ):
        if book.select(benchmark):
            parts += [[f"## {title}"], make(book)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"

"""One frozen dataclass holds every knob; presets fill it, the command line overrides it.

Adding a knob is adding a field: the flag, its help text with the default, its bounds, `config.json`
and the check against a checkpoint all come from the field.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import tomllib
import typing
from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib import resources
from typing import Any, Literal, NoReturn

from pyallreduce import UsageError

GROUPS = {
    "recipe": "recipe (a preset sets these)",
    "data": "data",
    "library": "gradient aggregation",
    "device": "device and precision",
    "run": "run",
}


def _knob(
    group: str,
    text: str,
    *,
    default: Any = dataclasses.MISSING,
    short: str | None = None,
    at_least: float | None = None,
    below: float | None = None,
    positive: bool = False,
    counts_in_k: bool = False,
    alone: Any = None,
    changes_weights: bool = False,
    changes_rounding: bool = False,
) -> Any:
    """A field with its help text, its bounds, and whether another value gives other weights.

    `alone` is the value of a flag that is given without one.

    A checkpoint is not continued under another value that `changes_weights`; of one that only
    `changes_rounding` the log tells.
    """
    metadata = {
        "group": group,
        "text": text,
        "short": short,
        "at_least": at_least,
        "below": below,
        "positive": positive,
        "counts_in_k": counts_in_k,
        "alone": alone,
        "changes_weights": changes_weights,
        "changes_rounding": changes_rounding,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on besides the number of processes.

    A value outside its bounds is a `UsageError` at construction, so a Config that exists is valid.
    """

    preset: str = _knob("run", "named recipe in train/presets", default="digits")

    dataset: str = _knob("recipe", "data set", changes_weights=True)
    model: str = _knob("recipe", "network", changes_weights=True)
    epochs: int = _knob(
        "recipe", "epochs, the same for every minibatch", at_least=1, changes_weights=True
    )
    batch_size: int = _knob(
        "recipe",
        "images per worker and iteration (n): batch norm sees so many; the minibatch is kn",
        short="-b",
        at_least=1,
        changes_weights=True,
    )
    minibatch: int | None = _knob(
        "recipe",
        "images per iteration over all workers (kn), a multiple of n; 8k is 8192 (default: n times "
        "the number of processes)",
        default=None,
        at_least=1,
        counts_in_k=True,
    )
    virtual_workers: int | None = _knob(
        "recipe",
        "logical workers (k), each with batch norm over n images of its own; a process takes "
        "several in turn where there are fewer processes (default: kn / n)",
        default=None,
        at_least=1,
        counts_in_k=True,
    )
    drop_last: bool = _knob(
        "recipe",
        "leave out the images of an epoch that do not fill a minibatch; otherwise the last one is "
        "smaller and normalised by its true size",
        default=True,
        changes_weights=True,
    )
    lr: float = _knob(
        "recipe",
        "learning rate at the reference minibatch; --lr-rule makes the peak from it",
        positive=True,
        changes_weights=True,
    )
    reference_minibatch: int = _knob(
        "recipe", "minibatch for which --lr was tuned", at_least=1, changes_weights=True
    )
    lr_rule: Literal["linear", "sqrt", "fixed"] = _knob(
        "recipe",
        "peak of the learning rate for r = kn / reference-minibatch. linear: lr * r (the paper's); "
        "for comparison sqrt: lr * sqrt(r), and fixed: lr",
        default="linear",
        changes_weights=True,
    )
    warmup: Literal["gradual", "constant", "none"] = _knob(
        "recipe",
        "way from the reference rate to a higher peak. gradual: by equal steps; constant: at "
        "once, at the end of the warmup; none: begin with the peak",
        default="gradual",
        changes_weights=True,
    )
    warmup_epochs: float = _knob(
        "recipe",
        "length of the warmup, used only when the peak is above the reference rate",
        at_least=0,
        changes_weights=True,
    )
    drops: tuple[Fraction, ...] = _knob(
        "recipe",
        "where the learning rate is divided by 10, as fractions of the epochs",
        changes_weights=True,
    )
    momentum: float = _knob("recipe", "momentum", at_least=0, below=1, changes_weights=True)
    nesterov: bool = _knob("recipe", "Nesterov momentum", default=True, changes_weights=True)
    weight_decay: float = _knob(
        "recipe",
        "weight decay, not applied to batch-norm gamma and beta",
        at_least=0,
        changes_weights=True,
    )
    momentum_form: Literal["reference", "absorbed"] = _knob(
        "recipe",
        "reference: u = m u + g, w -= lr u; absorbed: v = m v + lr g, w -= v",
        default="reference",
        changes_weights=True,
    )
    momentum_correction: bool = _knob(
        "recipe",
        "in the absorbed form, rescale v whenever the learning rate changes; without, the paper's "
        "pitfall",
        default=True,
        changes_weights=True,
    )
    zero_gamma: bool = _knob(
        "recipe",
        "begin with gamma 0 in the last batch norm of every residual block",
        default=True,
        changes_weights=True,
    )
    bn_statistics: Literal["worker0", "recomputed"] = _knob(
        "recipe",
        "what evaluation normalises by. worker0: the running averages of worker 0; recomputed: "
        "averages over --bn-images training images under the present weights",
        default="worker0",
    )
    bn_images: int = _knob(
        "recipe",
        "training images for --bn-statistics recomputed, n at a time",
        default=8192,
        at_least=1,
        counts_in_k=True,
    )
    label_smoothing: float = _knob(
        "recipe",
        "label smoothing of the training loss (none in the paper)",
        default=0.0,
        at_least=0,
        below=1,
        changes_weights=True,
    )
    max_norm: float | None = _knob(
        "recipe",
        "clip gradients to this global norm; their norm is then in metrics.jsonl (the paper does "
        "not clip)",
        default=None,
        positive=True,
        changes_weights=True,
    )
    seed: int = _knob(
        "recipe",
        "seed of the initialisation and of the permutations",
        default=0,
        at_least=0,
        changes_weights=True,
    )

    data_path: str | None = _knob(
        "data",
        "folder of the data set: train/CLASS/IMAGE and val/CLASS/IMAGE, tar shards (python -m train "
        "prepare), or torchvision's layout of cifar10, fashion-mnist, flowers",
        default=None,
    )
    download: bool = _knob(
        "data",
        "let torchvision fetch cifar10, fashion-mnist or flowers into --data-path",
        default=False,
    )
    synthetic: bool = _knob(
        "data",
        "random images in place of the data set's: the speed of everything but the loader",
        default=False,
        changes_weights=True,
    )
    synthetic_images: int = _knob(
        "data",
        "training images of a synthetic epoch",
        default=12800,
        at_least=1,
        changes_weights=True,
    )
    image_size: int = _knob(
        "data", "side of the crops of photographs", default=224, at_least=1, changes_weights=True
    )
    eval_resize: int = _knob(
        "data",
        "shorter side before the central crop of evaluation",
        default=256,
        at_least=1,
        changes_weights=True,
    )
    augment: bool = _knob(
        "data",
        "photographs: crops of 8 to 100 % of the area, aspect ratio 3/4 to 4/3, and flips; small "
        "images: shifts by up to 4 pixels, and flips; digits: nothing",
        default=True,
        changes_weights=True,
    )
    color_jitter: float = _knob(
        "data",
        "photographs: vary brightness, contrast, saturation by up to this share (the paper "
        "mentions none, its code base has 0.4)",
        default=0.0,
        at_least=0,
        changes_weights=True,
    )
    workers: int | None = _knob(
        "data",
        "loader processes per rank for photographs, 0: none (default: the rank's share of the "
        "cores, at most 16); no pixel depends on it",
        short="-j",
        default=None,
        at_least=0,
    )
    prefetch: int = _knob(
        "data", "batches that a loader process prepares ahead", default=2, at_least=1
    )
    decoder: Literal["auto", "simplejpeg", "torchcodec", "pillow"] = _knob(
        "data",
        "what decodes JPEG; auto: the first of these that is installed; all give the same pixels",
        default="auto",
    )
    corrupt_images: Literal["fatal", "skip"] = _knob(
        "data",
        "an image that cannot be read ends the run, or is reported and skipped: in training the "
        "next one takes its place, in evaluation it counts as an error",
        default="fatal",
    )

    update: Literal["step", "eager"] = _knob(
        "library",
        "step: parameters change in optimizer.step(); eager: as each bucket lands (same bits)",
        default="step",
    )
    bucket_kib: int = _knob(
        "library",
        "size of a gradient bucket in KiB; a resumed run keeps that of its checkpoint",
        at_least=1,
    )
    timeout_s: float = _knob(
        "library",
        "seconds to wait for another process before giving up",
        default=60.0,
        positive=True,
    )

    device: Literal["auto", "cpu", "cuda"] = _knob(
        "device",
        "auto: a GPU per process where all have one and the library takes its tensors, else the CPU",
        default="auto",
        changes_rounding=True,
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = _knob(
        "device",
        "of the forward and backward pass; weights, sums and the update stay float32. tf32: "
        "float32 with short products on a GPU; bf16, fp16: autocast, fp16 with a gradient scaler",
        default="fp32",
        changes_weights=True,
    )
    channels_last: bool | None = _knob(
        "device",
        "memory format NHWC (default: on a GPU)",
        default=None,
        changes_rounding=True,
    )
    compile: bool = _knob(
        "device",
        "torch.compile the network; its backward is one piece then, and hides less communication",
        default=False,
        changes_rounding=True,
    )

    nproc: int | None = _knob(
        "run",
        "start this many processes here (leave out under torchrun, mpirun, srun)",
        at_least=1,
        default=None,
    )
    resume: str | None = _knob(
        "run",
        "continue from a checkpoint: its path, a run directory for the newest intact one in it, "
        "or auto for the newest run of this name (a new run if there is none)",
        default=None,
    )
    checkpoint_every: int | None = _knob(
        "run",
        "iterations between checkpoints, besides the one at the end of every epoch",
        default=None,
        at_least=1,
    )
    keep: int = _knob(
        "run",
        "checkpoints to keep: so many of the newest, and the one with the lowest held-out error",
        default=3,
        at_least=1,
    )
    output_dir: str = _knob("run", "where run directories are made", default="runs")
    name: str | None = _knob(
        "run",
        "name of the run directory; a taken name gets a suffix (default: the preset's)",
        default=None,
    )
    runs: int = _knob(
        "run",
        "train so many times, with the seeds seed, seed + 1, ..., and give mean and deviation (5 in "
        "the paper)",
        default=1,
        at_least=1,
    )
    report: bool = _knob(
        "run", "draw the pictures and write report.html when the run ends", default=True
    )
    profile: int | None = _knob(
        "run",
        "trace so many iterations of rank 0 with torch.profiler, 5 without N, into profiling/traces "
        "of the run directory (the timeline of the report needs no flag)",
        default=None,
        at_least=1,
        alone=5,
    )
    print_freq: int = _knob("run", "iterations between log lines", default=10, at_least=1)
    max_steps: int | None = _knob(
        "run",
        "stop after this many iterations in all, keeping the schedule of the whole run",
        default=None,
        at_least=1,
    )
    test_only: bool = _knob(
        "run",
        "only evaluate the checkpoint that --resume names, in a new run directory; with "
        "--bn-statistics under either kind of statistics",
        default=False,
    )
    assert_top1: float | None = _knob(
        "run",
        "exit with code 3 when the held-out accuracy in percent is below this",
        default=None,
        at_least=0,
    )
    json: bool = _knob(
        "run",
        "print one JSON object at the end on stdout; everything else goes to stderr",
        default=False,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_bounds(field, getattr(self, field.name))
        if self.name is not None and (not self.name or set("/\0") & set(self.name)):
            raise UsageError(
                f"--name: given {self.name!r}, accepted: a file name without '/'; "
                "put directories into --output-dir"
            )
        if self.test_only and self.resume is None:
            raise UsageError(
                "--test-only: given without --resume, accepted: together with --resume PATH, the "
                "checkpoint or run to evaluate; add it"
            )
        if self.eval_resize < self.image_size:
            raise UsageError(
                f"--eval-resize: given {self.eval_resize}, accepted: at least the --image-size of "
                f"{self.image_size}, which is cut out of it; the paper has 256 and 224"
            )
        if list(self.drops) != sorted(set(self.drops)) or not all(0 < d < 1 for d in self.drops):
            raise UsageError(
                f"--drops: given {_show(self.drops)}, accepted: increasing fractions "
                "between 0 and 1 such as 1/3,2/3,8/9; write them in that order"
            )

        if self.precision == "fp16" and self.update == "eager":
            raise UsageError(
                "--precision fp16: the gradient scaler may have to skip an update, which --update "
                "eager has already done; give --update step, or --precision bf16"
            )

    def to_json(self) -> dict[str, Any]:
        """Every field by name; fractions as text."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def recipe(self) -> dict[str, Any]:
        """The fields that the weights depend on, if only by rounding."""
        return {f.name: _plain(getattr(self, f.name)) for f in _that_change(weights=None)}

    def differences(
        self, stored: Mapping[str, Any], *, weights: bool
    ) -> dict[str, tuple[str, str]]:
        """What a checkpoint's `recipe()` has otherwise: flag -> (there, here).

        `weights`: of the fields that change the weights, else of those that change only their
        rounding. A field that the checkpoint does not know had its default then.
        """
        found = {}
        for field in _that_change(weights=weights):
            then = stored.get(field.name, _plain(field.default))
            now = _plain(getattr(self, field.name))
            if then != now:
                found[flag(field.name)] = (_show(then), _show(now))
        return found


def _that_change(weights: bool | None) -> list[dataclasses.Field[Any]]:
    """Fields that change the weights (True), only their rounding (False), or either (None)."""
    kinds = {
        True: ("changes_weights",),
        False: ("changes_rounding",),
        None: ("changes_weights", "changes_rounding"),
    }[weights]
    return [f for f in dataclasses.fields(Config) if any(f.metadata[kind] for kind in kinds)]


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def preset_names() -> list[str]:
    """The presets that come with the package, sorted."""
    folder = resources.files("train") / "presets"
    return sorted(
        p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")
    )


def load_preset(name: str) -> dict[str, Any]:
    """The preset's values by field name. UsageError for an unknown preset or an unknown key."""
    if name not in preset_names():
        raise UsageError(
            f"--preset: given {name!r}, accepted: {', '.join(preset_names())}; "
            "choose one of these and override single values by flags"
        )
    text = (resources.files("train") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    values = tomllib.loads(text)
    known = {f.name for f in dataclasses.fields(Config)}
    if unknown := sorted(values.keys() - known):
        raise UsageError(
            f"preset {name}: unknown key {unknown[0]!r}, accepted: "
            f"{', '.join(sorted(known))}; correct train/presets/{name}.toml"
        )
    if "drops" in values:
        values["drops"] = tuple(Fraction(d) for d in values["drops"])
    return values


def parse(command: str, argv: Sequence[str]) -> Config:
    """The configuration of `python -m train COMMAND ARGV`: dataclass defaults < preset < flags.

    Exits with code 2 and one message on stderr when a flag is wrong; raises UsageError when a value
    is.
    """
    argv = [_hyphenated(a) for a in argv]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="digits")
    preset = first.parse_known_args(argv)[0].preset
    values = load_preset(preset)

    given = vars(_parser(command, preset, values).parse_args(argv))
    given.pop("local_rank")
    return Config(**{**values, **given})


class Parser(argparse.ArgumentParser):
    """argparse for every command: says what to do next, and suggests the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            given = message.removeprefix("unrecognized arguments: ").split()[0]
            known = [o for o in self._option_string_actions if o.startswith("--")]
            close = difflib.get_close_matches(given.split("=")[0], known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            message = f"given {given}, which is not a flag of this command{hint}"
        self.exit(2, f"{self.prog}: error: {message}; see '{self.prog} --help'\n")


def _parser(command: str, preset: str, values: dict[str, Any]) -> Parser:
    # Absent flags stay absent (SUPPRESS), so that a preset's value is not covered by a default;
    # the help text therefore prints the value that would be used.
    parser = Parser(
        prog=f"python -m train {command}",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train with the paper's recipe. Defaults shown are those of "
        f"--preset {preset}.",
    )
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        meta = field.metadata
        used = values.get(field.name, field.default)
        names = [meta["short"]] if meta["short"] else []
        names.append(flag(field.name))
        groups[meta["group"]].add_argument(
            *names,
            dest=field.name,
            help=f"{meta['text']} (default: {_show(used)})".replace("%", "%%"),
            **_argument(types[field.name], meta["counts_in_k"]),
            **({} if meta["alone"] is None else {"nargs": "?", "const": meta["alone"]}),
        )
    # Old launchers append it; the launcher's environment says the same.
    parser.add_argument("--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def _argument(annotation: Any, counts_in_k: bool) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    if bool in (annotation, *options):
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(annotation) is Literal:
        return {"type": _one_of(options), "metavar": "|".join(options)}
    if typing.get_origin(annotation) is tuple:
        return {"type": _fractions, "metavar": "A,B,..."}
    kind = options[0] if options else annotation
    if counts_in_k:
        return {"type": _count, "metavar": "N|Nk"}
    reader = {int: _integer, float: _number, str: str}[kind]
    return {"type": reader, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"given {text!r}, accepted: an integer") from None


def _count(text: str) -> int:
    """The paper's "8k" is 8 * 1024."""
    try:
        return int(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"given {text!r}, accepted: an integer, or one with k for 1024 such as 8k"
        ) from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"given {text!r}, accepted: a finite number")
    return value


def _fractions(text: str) -> tuple[Fraction, ...]:
    try:
        return tuple(Fraction(part) for part in text.split(",") if part.strip())
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"given {text!r}, accepted: fractions separated by commas such as 1/3,2/3,8/9"
        ) from None


def _one_of(options: Sequence[str]) -> Any:
    def read(text: str) -> str:
        if text not in options:
            raise argparse.ArgumentTypeError(f"given {text!r}, accepted: {' or '.join(options)}")
        return text

    return read


def _check_bounds(field: dataclasses.Field[Any], value: Any) -> None:
    meta = field.metadata
    if value is None or isinstance(value, str | bool | tuple):
        return
    accepted = []
    if meta["positive"]:
        accepted.append("above 0")
    if meta["at_least"] is not None:
        accepted.append(f"of at least {meta['at_least']}")
    if meta["below"] is not None:
        accepted.append(f"below {meta['below']}")
    outside = (
        (meta["positive"] and not value > 0)
        or (meta["at_least"] is not None and not value >= meta["at_least"])
        or (meta["below"] is not None and not value < meta["below"])
    )
    if outside:
        kind = "an integer" if isinstance(value, int) else "a number"
        raise UsageError(
            f"{flag(field.name)}: given {value}, accepted: {kind} "
            f"{' and '.join(accepted)}; change the value, or leave the flag out to "
            "take the preset's"
        )


def _hyphenated(argument: str) -> str:
    """`--batch_size=8` as `--batch-size=8`: both spellings are in use elsewhere."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _plain(value: Any) -> Any:
    return [str(v) for v in value] if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return ",".join(str(v) for v in value)
    return json.dumps(value) if isinstance(value, bool) else str(value)

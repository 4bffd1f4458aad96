"""What sparsity-accelerated training (SAT) does in a run, and its command-line flags.

`SATConfig` is the only form in which the rest of the package sees these settings; an argparse
namespace stays in this file and in those that read a command line.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Schedule = Literal["ladder", "constant", "linear", "cosine"]
Metric = Literal["uniform", "magnitude", "wanda", "maxip"]
Selection = Literal["sampling", "top-k", "static"]
Module = Literal["attention", "mlp"]
Scope = Literal["step", "micro-batch"]

SCHEDULES: tuple[str, ...] = get_args(Schedule)
METRICS: tuple[str, ...] = get_args(Metric)
SELECTIONS: tuple[str, ...] = get_args(Selection)
MODULES: tuple[str, ...] = get_args(Module)
SCOPES: tuple[str, ...] = get_args(Scope)
_MOST_RUNGS = 64


def _flag(name: str) -> str:
    return "--sat-" + name.replace("_", "-")


def _invalid(name: str, value: object, valid: str) -> ValueError:
    return ValueError(f"{name} ({_flag(name)}) is {value!r}; valid: {valid}")


@dataclass(frozen=True, kw_only=True)
class SATConfig:
    """Settings of sparsity-accelerated training, checked when they are made.

    Raises:
        ValueError: names the field, its flag, the value and what would be valid.
    """

    omission_rate: float
    """Share r of attention heads and MLP channels left out, in [0, 1), before any decay."""

    total_steps: int
    """Steps T that the schedule spans; training after them is dense."""

    decay_start_step: int
    """Step eta, in [0, T], after which the rate begins to fall; up to it the rate is r."""

    schedule: Schedule = "ladder"
    """How the rate falls after eta: "ladder" (equation 11), "linear", "cosine"; "constant" not
    at all."""

    ladder_rungs: int = 5
    """Rungs L of the ladder, up to 64; each is twice as long as the one before and the last is
    dense."""

    metric: Metric = "maxip"
    """How important a neuron is (equation 5)."""

    selection: Selection = "sampling"
    """"sampling" draws without replacement (equation 8), "top-k" takes the best, "static" ranks
    once, at the first sparse step, and keeps to that ranking."""

    temperature: float = 0.05
    """Temperature tau of the sampling."""

    modules: tuple[Module, ...] = ("attention", "mlp")
    """Where neurons are left out; kept in the order ("attention", "mlp")."""

    selection_groups: int | None = None
    """Contiguous groups with equal shares of heads and of channels; None: the tensor-parallel
    size."""

    channel_multiple: int = 128
    """Kept channels of a group are a multiple of this; odd counts can be slower than dense."""

    scope: Scope = "step"
    """How long a subset lasts: "step" (all micro-batches of a step) or "micro-batch"."""

    seed: int = 1234
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        self._check_real("omission_rate", "a number in [0, 1)", low=0.0, low_open=False, high=1.0)
        self._check_integer("total_steps", 1)
        self._check_integer("decay_start_step", 0)
        if self.decay_start_step > self.total_steps:
            valid = f"0 to total_steps ({_flag('total_steps')}), which is {self.total_steps}"
            raise _invalid("decay_start_step", self.decay_start_step, valid)
        self._check_choice("schedule", SCHEDULES)
        self._check_integer("ladder_rungs", 1)
        if self.ladder_rungs > _MOST_RUNGS:
            # Rungs halve towards the first one: those of more would be shorter than a step.
            raise _invalid("ladder_rungs", self.ladder_rungs, f"1 to {_MOST_RUNGS}")
        self._check_choice("metric", METRICS)
        self._check_choice("selection", SELECTIONS)
        self._check_real("temperature", "a number above 0", low=0.0, low_open=True, high=math.inf)
        self._check_modules()
        if self.selection_groups is not None:
            self._check_integer("selection_groups", 1)
        self._check_integer("channel_multiple", 1)
        self._check_choice("scope", SCOPES)
        self._check_integer("seed", 0)

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _invalid(name, value, f"an integer of at least {least}")

    def _check_real(
        self, name: str, valid: str, *, low: float, low_open: bool, high: float
    ) -> None:
        value = getattr(self, name)
        # NaN fails every comparison, so each bound is stated as what must hold.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (low < value if low_open else low <= value)
            or not value < high
        ):
            raise _invalid(name, value, valid)
        object.__setattr__(self, name, float(value))

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise _invalid(name, value, "one of " + ", ".join(choices))

    def _check_modules(self) -> None:
        value = self.modules
        valid = "one or more of " + ", ".join(MODULES) + ", each once"
        if not isinstance(value, list | tuple) or not value:
            raise _invalid("modules", value, valid)
        if any(module not in MODULES for module in value) or len(set(value)) != len(value):
            raise _invalid("modules", value, valid)
        object.__setattr__(self, "modules", tuple(m for m in MODULES if m in value))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values: `from_dict` of it, through JSON or not, is this config."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"modules": list(self.modules)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SATConfig":
        """Builds the config from what `to_dict` gave.

        Raises:
            ValueError: for a field that is unknown, missing or invalid.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(
                f"unknown SAT settings {', '.join(unknown)}; valid: {', '.join(names)}"
            )
        missing = [
            name
            for name in ("omission_rate", "total_steps", "decay_start_step")
            if name not in values
        ]
        if missing:
            raise ValueError(f"SAT settings lack {', '.join(missing)}")
        return cls(**values)


def add_sat_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the --sat-* flags, one for each field of `SATConfig`, and --sat-autotune, as a group of
    their own.

    Each is None until it is given, for `sat_config_from_args` to resolve.
    """
    default = {field.name: field.default for field in fields(SATConfig)}
    group = parser.add_argument_group(
        "sparsity-accelerated training",
        "Symbols are those of the paper (arXiv 2406.01392, section 2.2). Without "
        "--sat-omission-rate training is dense and the others are refused.",
    )
    group.add_argument(
        "--sat-omission-rate",
        type=float,
        metavar="R",
        help="omission rate r, in [0, 1): share of attention heads and MLP channels left out up "
        "to step eta (default: 0, dense training)",
    )
    group.add_argument(
        "--sat-total-steps",
        type=int,
        metavar="T",
        help="steps T that the schedule spans (default: --train-iters)",
    )
    group.add_argument(
        "--sat-decay-start-step",
        type=int,
        metavar="ETA",
        help="step eta, in [0, T], after which the rate begins to fall (default: two thirds of "
        "T, as in the paper)",
    )
    group.add_argument(
        "--sat-schedule",
        choices=SCHEDULES,
        help=f"how the rate falls after eta (default: {default['schedule']}, equation 11)",
    )
    group.add_argument(
        "--sat-ladder-rungs",
        type=int,
        metavar="L",
        help="number of rungs L of the ladder; the last is dense "
        f"(default: {default['ladder_rungs']})",
    )
    group.add_argument(
        "--sat-metric",
        choices=METRICS,
        help=f"importance s of a neuron, equation 5 (default: {default['metric']})",
    )
    group.add_argument(
        "--sat-selection",
        choices=SELECTIONS,
        help="how neurons are chosen by importance: sampling is equation 8, static ranks once "
        f"and keeps to it (default: {default['selection']})",
    )
    group.add_argument(
        "--sat-temperature",
        type=float,
        metavar="TAU",
        help=f"temperature tau of the sampling, above 0 (default: {default['temperature']})",
    )
    group.add_argument(
        "--sat-modules",
        nargs="+",
        choices=MODULES,
        help=f"where neurons are left out (default: {' '.join(MODULES)})",
    )
    group.add_argument(
        "--sat-selection-groups",
        type=int,
        metavar="N",
        help="contiguous groups of heads and of channels that keep equal shares, a multiple of "
        "the tensor-parallel size (default: the tensor-parallel size)",
    )
    group.add_argument(
        "--sat-channel-multiple",
        type=int,
        metavar="N",
        help="kept channels of a group are a multiple of N; 1 with one selection group gives the "
        "paper's counts, floor(n (1 - r)), which can be slower than dense "
        f"(default: {default['channel_multiple']})",
    )
    group.add_argument(
        "--sat-scope",
        choices=SCOPES,
        help="how long a subset lasts: all micro-batches of a step, the paper's iteration, or "
        f"one (default: {default['scope']})",
    )
    group.add_argument(
        "--sat-seed",
        type=int,
        metavar="N",
        help=f"seed of the sampling (default: {default['seed']})",
    )
    group.add_argument(
        "--sat-autotune",
        nargs="?",
        const="",
        metavar="FILE",
        help="before the first step measure a layer (under ZeRO-3: a few) at every rate of the "
        "schedule, take the counts that run fastest near it, and run dense where that is faster; "
        "FILE keeps the table for other runs of the same kind (default: counts are rounded, and "
        "not measured)",
    )


def sat_config_from_args(args: argparse.Namespace) -> SATConfig | None:
    """The config that parsed flags ask for, or None for dense training (rate 0, or not given).

    `args` holds what `add_sat_arguments` adds, and `train_iters`, the default for T. The default
    for eta is two thirds of T, rounded down. `selection_groups` stays None where its flag is not
    given: the tensor-parallel size takes its place later.

    Raises:
        ValueError: names the flag, the value and what would be valid; so does another of these
            flags without `--sat-omission-rate`, which would have no effect.
    """
    given = {
        field.name: value
        for field in fields(SATConfig)
        if (value := getattr(args, "sat_" + field.name)) is not None
    }
    if "omission_rate" not in given:
        without_effect = [*given, *(["autotune"] if args.sat_autotune is not None else [])]
        if without_effect:
            raise ValueError(
                f"--sat-omission-rate is needed with {', '.join(map(_flag, without_effect))}: "
                "without it training is dense; give 0 if that is meant"
            )
        return None
    if "total_steps" not in given:
        if args.train_iters is None:
            if given["omission_rate"] == 0:
                return None
            raise ValueError(
                "--sat-omission-rate needs the number of steps: give --sat-total-steps or "
                "--train-iters"
            )
        given["total_steps"] = args.train_iters
    given.setdefault("decay_start_step", max(0, 2 * given["total_steps"] // 3))
    config = SATConfig(**given)
    # Checked at rate 0 as well: a flag that makes no sense is a mistake in dense training too.
    return config if config.omission_rate > 0 else None

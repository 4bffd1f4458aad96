"""The flags of a run that watches itself: when it stops early, and what it does not put up with."""

import argparse
import math

from megatron_sat.training.config import WatchConfig


def add_watch_arguments(group: argparse._ArgumentGroup) -> None:
    """Add them; their names are the fields of `WatchConfig`."""
    add, defaults = group.add_argument, WatchConfig()
    add(
        "--exit-interval",
        type=int,
        help="save and stop after every so many iterations (default: never)",
    )
    add(
        "--exit-duration-in-mins",
        type=float,
        help="save and stop after so many minutes (default: never)",
    )
    add(
        "--max-skipped-steps",
        type=int,
        default=defaults.max_skipped_steps,
        help="stop when so many steps in a row were skipped because a loss or gradient was not "
        "finite (default: %(default)s)",
    )
    add(
        "--loss-spike-threshold",
        type=float,
        help="a step whose loss is so many deviations above the median of the last 128 is a spike, "
        "of which a snapshot is saved (default: not looked for)",
    )
    add(
        "--rollback-on-spike",
        action="store_true",
        help="go back to the weights of the last checkpoint after a spike, and on with the data "
        "behind it (default: off)",
    )
    add(
        "--check-weight-hash-across-dp-replicas-interval",
        type=int,
        default=defaults.check_weight_hash_across_dp_replicas_interval,
        help="iterations between comparisons of what ranks hold copies of, 0 for none "
        "(default: %(default)s)",
    )
    add(
        "--hang-timeout-minutes",
        type=float,
        default=defaults.hang_timeout_minutes,
        help="stop all ranks when one has not moved for so long, 0 for never; building, evaluating "
        "and saving have six times as long (default: %(default)s)",
    )


def check_watch(watch: WatchConfig, *, save: str | None) -> None:
    """ValueError with the flag, its value and what would be valid."""
    for flag, value, least in (
        ("--exit-interval", watch.exit_interval, 1),
        ("--max-skipped-steps", watch.max_skipped_steps, 1),
        (
            "--check-weight-hash-across-dp-replicas-interval",
            watch.check_weight_hash_across_dp_replicas_interval,
            0,
        ),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} is {value}; valid: at least {least}")
    for flag, number in (
        ("--exit-duration-in-mins", watch.exit_duration_in_mins),
        ("--loss-spike-threshold", watch.loss_spike_threshold),
    ):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{flag} is {number}; valid: above 0")
    if not 0 <= watch.hang_timeout_minutes < math.inf:
        raise ValueError(
            f"--hang-timeout-minutes is {watch.hang_timeout_minutes}; valid: at least 0"
        )
    if not watch.rollback_on_spike:
        return
    if watch.loss_spike_threshold is None:
        raise ValueError("--rollback-on-spike needs --loss-spike-threshold, which says what one is")
    if save is None:
        raise ValueError("--rollback-on-spike needs --save, the directory for checkpoints")

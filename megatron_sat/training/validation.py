"""What makes a configuration of a run invalid, beyond the type of each flag.

Every check raises ValueError with the flag's name, its value and what would be valid.
"""

import re

import torch

from megatron_sat.bad_input import reason, shorten
from megatron_sat.training.checkpoint_arguments import at_least, check_checkpoint
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.watch_arguments import check_watch

LONGEST_TIMEOUT = 365 * 24 * 60


def check_config(config: TrainingConfig) -> None:
    """Everything that needs neither files nor the number of ranks."""
    _check_numbers(config)
    _check_model(config)
    _check_tensor_parallel(config)
    _check_recomputation(config)
    _check_learning_rate(config)
    _check_data(config)
    check_checkpoint(config)
    _check_train_only(config)
    _check_autotune(config)
    check_watch(config.watch, save=config.checkpoint.save)


def check_sat_layout(config: TrainingConfig, *, resuming: bool) -> None:
    """SAT's selection groups divide the model and, in a new run, are spread evenly over ranks.

    A resumed run (`resuming`) may keep groups that do not fit its tensor-parallel size; its ranks
    then get unequal work.
    """
    if config.sat is None:
        return
    model, sat = config.model, config.sat
    tensor_parallel = config.parallel.tensor_model_parallel_size
    groups = tensor_parallel if sat.selection_groups is None else sat.selection_groups
    if groups % tensor_parallel and not resuming:
        raise ValueError(
            f"--sat-selection-groups is {groups}; valid for a new run: a multiple of "
            f"--tensor-model-parallel-size, which is {tensor_parallel}"
        )
    if "attention" in sat.modules:
        if model.num_query_groups % groups:
            raise ValueError(
                f"--sat-selection-groups is {groups}; valid with attention in --sat-modules: a "
                f"divisor of the {model.num_query_groups} query groups (--num-query-groups, or "
                "--num-attention-heads without it)"
            )
        if model.num_query_groups < tensor_parallel:
            raise ValueError(
                f"--num-query-groups is {model.num_query_groups}; valid with attention in "
                "--sat-modules: at least --tensor-model-parallel-size, which is "
                f"{tensor_parallel}; or leave attention out with --sat-modules mlp"
            )
    if "mlp" in sat.modules and model.ffn_hidden_size % groups:
        raise ValueError(
            f"--sat-selection-groups is {groups}; valid with mlp in --sat-modules: a divisor of "
            f"--ffn-hidden-size, which is {model.ffn_hidden_size}"
        )


def _within(flag: str, value: float, *, above: float | None = None, below: float) -> None:
    """0 <= value < below, or above < value <= below."""
    if above is None and not 0 <= value < below:
        raise ValueError(f"{flag} is {value}; valid: at least 0 and below {below}")
    if above is not None and not above < value <= below:
        raise ValueError(f"{flag} is {value}; valid: above {above}, up to {below}")


def _check_numbers(config: TrainingConfig) -> None:
    model = config.model
    for name in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "seq_length",
        "max_position_embeddings",
        "make_vocab_size_divisible_by",
        "vocab_size",
    ):
        at_least("--" + name.replace("_", "-"), getattr(model, name), 1)
    at_least("--tensor-model-parallel-size", config.parallel.tensor_model_parallel_size, 1)
    for name in ("micro_batch_size", "global_batch_size", "train_iters", "eval_interval"):
        at_least("--" + name.replace("_", "-"), getattr(config, name), 1)
    at_least("--eval-iters", config.eval_iters, 0)
    at_least("--seed", config.seed, 1)
    if not 1 <= config.distributed_timeout_minutes <= LONGEST_TIMEOUT:
        raise ValueError(
            f"--distributed-timeout-minutes is {config.distributed_timeout_minutes}; valid: 1 to "
            f"{LONGEST_TIMEOUT}, a year"
        )
    at_least("--log-interval", config.logging.log_interval, 1)
    at_least("--num-workers", config.data.num_workers, 0)
    at_least("--init-method-std", model.init_method_std, 0)
    _within("--rotary-percent", model.rotary_percent, above=0, below=1)
    for flag, positive in (
        ("--norm-epsilon", model.norm_epsilon),
        ("--rotary-base", model.rotary_base),
    ):
        if not positive > 0:
            raise ValueError(f"{flag} is {positive}; valid: above 0")
    if config.attention_dropout != 0:
        raise ValueError(
            f"--attention-dropout is {config.attention_dropout}; valid: 0, the attention kernels "
            "have no dropout"
        )
    _within("--hidden-dropout", config.hidden_dropout, below=1)
    if config.hidden_dropout > 0 and not torch.cuda.is_available():
        raise ValueError(f"--hidden-dropout is {config.hidden_dropout}; valid without a GPU: 0")
    if config.parallel.zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"--zero-stage is {config.parallel.zero_stage}; valid: 0, 1, 2, 3")


def _check_model(config: TrainingConfig) -> None:
    model = config.model
    if model.num_attention_heads % model.num_query_groups:
        raise ValueError(
            f"--num-query-groups is {model.num_query_groups}; valid: a divisor of "
            f"--num-attention-heads, which is {model.num_attention_heads}"
        )
    if model.max_position_embeddings < model.seq_length:
        raise ValueError(
            f"--max-position-embeddings is {model.max_position_embeddings}; valid: at least "
            f"--seq-length, which is {model.seq_length}"
        )
    if not model.rope_scaling_factor >= 1:
        raise ValueError(f"--rope-scaling-factor is {model.rope_scaling_factor}; valid: at least 1")
    window, layers = model.window_size, model.window_attn_skip_freq
    if window is not None and (len(window) != 2 or window[0] < 0 or window[1] != 0):
        raise ValueError(
            f"--window-size is {window}; valid: the tokens before, at least 0, and 0 after, as "
            "4095,0"
        )
    if layers is not None and (len(layers) != model.num_layers or not set(layers) <= {0, 1}):
        raise ValueError(
            f"--window-attn-skip-freq is {layers}; valid: 1 or 0 for each of the "
            f"{model.num_layers} layers"
        )
    rotated = int(model.kv_channels * model.rotary_percent)
    if rotated % 2 or rotated == 0:
        raise ValueError(
            f"--kv-channels {model.kv_channels} x --rotary-percent {model.rotary_percent} rotates "
            f"{rotated} channels of a head; valid: an even number above 0"
        )


def _check_tensor_parallel(config: TrainingConfig) -> None:
    model, size = config.model, config.parallel.tensor_model_parallel_size
    for flag, value in (
        ("--num-attention-heads", model.num_attention_heads),
        ("--ffn-hidden-size", model.ffn_hidden_size),
    ):
        if value % size:
            raise ValueError(
                f"{flag} is {value}; valid: a multiple of --tensor-model-parallel-size, which is "
                f"{size}"
            )
    if model.num_query_groups % size and size % model.num_query_groups:
        raise ValueError(
            f"--num-query-groups is {model.num_query_groups}; valid: a multiple or a divisor of "
            f"--tensor-model-parallel-size, which is {size}"
        )
    if not config.parallel.sequence_parallel:
        return
    if size == 1:
        raise ValueError("--sequence-parallel needs --tensor-model-parallel-size above 1")
    if model.seq_length % size:
        raise ValueError(
            f"--seq-length is {model.seq_length}; valid with --sequence-parallel: a multiple of "
            f"--tensor-model-parallel-size, which is {size}"
        )


def _check_recomputation(config: TrainingConfig) -> None:
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.recompute_granularity == "full":
        count = parallel.recompute_num_layers
        if parallel.recompute_method is None or count is None:
            raise ValueError(
                "--recompute-granularity full needs --recompute-method uniform or block and "
                f"--recompute-num-layers, 1 to --num-layers, which is {layers}"
            )
        if not 1 <= count <= layers:
            raise ValueError(
                f"--recompute-num-layers is {count}; valid with --recompute-granularity full: 1 to "
                f"--num-layers, which is {layers}"
            )
        if parallel.recompute_modules:
            raise ValueError("--recompute-modules needs --recompute-granularity selective")
        return
    given = {
        "--recompute-method": parallel.recompute_method,
        "--recompute-num-layers": parallel.recompute_num_layers,
    }
    for flag, value in given.items():
        if value is not None:
            raise ValueError(f"{flag} is {value}; it needs --recompute-granularity full")
    if parallel.recompute_modules and parallel.recompute_granularity is None:
        raise ValueError("--recompute-modules needs --recompute-granularity selective")


def _check_learning_rate(config: TrainingConfig) -> None:
    optimizer = config.optimizer
    for flag, value in (
        ("--min-lr", optimizer.min_lr),
        ("--lr-warmup-init", optimizer.lr_warmup_init),
        ("--weight-decay", optimizer.weight_decay),
        ("--clip-grad", optimizer.clip_grad),
    ):
        at_least(flag, value, 0)
    if not 0 < optimizer.lr < float("inf"):
        raise ValueError(f"--lr is {optimizer.lr}; valid: above 0")
    for flag, value in (
        ("--min-lr", optimizer.min_lr),
        ("--lr-warmup-init", optimizer.lr_warmup_init),
    ):
        if value > optimizer.lr:
            raise ValueError(f"{flag} is {value}; valid: at most --lr, which is {optimizer.lr}")
    _within("--adam-beta1", optimizer.adam_beta1, below=1)
    _within("--adam-beta2", optimizer.adam_beta2, below=1)
    if not optimizer.adam_eps > 0:
        raise ValueError(f"--adam-eps is {optimizer.adam_eps}; valid: above 0")
    at_least("--lr-decay-iters", optimizer.lr_decay_iters, 1)
    if not 0 <= optimizer.lr_warmup_iters < optimizer.lr_decay_iters:
        raise ValueError(
            f"--lr-warmup-iters is {optimizer.lr_warmup_iters}; valid: at least 0 and below "
            f"--lr-decay-iters (default --train-iters), which is {optimizer.lr_decay_iters}"
        )
    annealing = optimizer.lr_wsd_decay_iters
    if optimizer.lr_decay_style == "WSD":
        longest = optimizer.lr_decay_iters - optimizer.lr_warmup_iters
        if annealing is None or not 1 <= annealing <= longest:
            raise ValueError(
                f"--lr-wsd-decay-iters is {annealing}; valid with --lr-decay-style WSD: 1 to "
                f"{longest}, the decay without the warm-up"
            )
    elif annealing is not None:
        raise ValueError(
            f"--lr-wsd-decay-iters is {annealing}; it needs --lr-decay-style WSD, which is "
            f"{optimizer.lr_decay_style}"
        )
    if optimizer.override_opt_param_scheduler and optimizer.use_checkpoint_opt_param_scheduler:
        raise ValueError(
            "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each "
            "other"
        )


def _check_data(config: TrainingConfig) -> None:
    data = config.data
    if bool(data.data_path) == bool(data.train_data_path):
        raise ValueError("give one of --data-path, --data-args-path and --train-data-path")
    if data.split is not None:
        try:
            shares = [float(share) for share in data.split.split(",")]
        except ValueError:
            shares = []
        if (
            not 1 <= len(shares) <= 3
            or not all(share >= 0 for share in shares)
            or not 0 < shares[0] <= sum(shares) < float("inf")
        ):
            raise ValueError(
                f"--split is {data.split!r}; valid: up to three shares for training, validation "
                'and test, as "969,30,1", the first above 0'
            )
        if len(shares) > 1 and shares[1] > 0 and "valid" in data.valid_data:
            raise ValueError(
                f'--split {data.split} already makes the validation set "valid"; set its second '
                "share to 0, or give the other set another name with --valid-data NAME=PREFIX"
            )
    if data.tokenizer_type == "NullTokenizer":
        if config.model.vocab_size is None:
            raise ValueError("--tokenizer-type NullTokenizer needs --vocab-size")
    elif data.tokenizer_model is None:
        raise ValueError(f"--tokenizer-type {data.tokenizer_type} needs --tokenizer-model")


def _check_autotune(config: TrainingConfig) -> None:
    if config.sat_autotune is None or config.sat is None:
        return
    if config.sat.schedule not in ("ladder", "constant"):
        raise ValueError(
            f"--sat-autotune measures each rate of the schedule, and --sat-schedule "
            f"{config.sat.schedule} has one for every step; valid with it: ladder or constant"
        )


def _check_train_only(config: TrainingConfig) -> None:
    if config.train_only is None:
        return
    try:
        re.compile(config.train_only)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"--train-only {shorten(repr(config.train_only))} is not a regular expression "
            f"({reason(error)}); valid: as "
            "'word_embeddings|output_layer'"
        ) from error

"""The configuration of a training run, as frozen dataclasses.

Field names are Megatron's flag names with underscores, so that a flag, its field and Megatron's
documentation speak of the same thing. `arguments.parse_args` makes a `TrainingConfig` in which
every default is resolved and every contradiction refused; nothing after it sees argparse.
`to_dict` and `from_dict` are exact inverses and the dictionary is plain JSON: it travels in
checkpoints.
"""

import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Self

import torch

from megatron_sat.config import SATConfig

NormalizationName = Literal["RMSNorm", "LayerNorm"]
DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WSDDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
HFDtype = Literal["bfloat16", "float32"]
TokenizerType = Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer"]

_AFTER_WATCHDOG = 2
"""Minutes by which torch's own timeout comes after the watchdog's."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the model. Defaults are Llama's."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream, h."""
    ffn_hidden_size: int
    """Channels of the MLP (of the gate and of the up projection each)."""
    num_attention_heads: int
    """Query heads over all tensor-parallel ranks."""
    num_query_groups: int
    """Key/value groups; equal to `num_attention_heads` without grouped-query attention."""
    kv_channels: int
    """Width of one head."""
    seq_length: int
    """Tokens of one training sample."""
    max_position_embeddings: int
    """Longest sequence the model is meant for; at least `seq_length`."""
    normalization: NormalizationName = "RMSNorm"
    """Norm before attention, before the MLP and at the end."""
    norm_epsilon: float = 1e-5
    """Added to the variance in the norms."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding (500000 for Llama 3)."""
    rotary_percent: float = 1.0
    """Share of a head's width that is rotated."""
    use_rope_scaling: bool = False
    """Llama 3.1's scaling of the rotary frequencies, from an original context of 8192 tokens."""
    rope_scaling_factor: float = 8.0
    """What Llama 3.1's scaling divides the low frequencies by."""
    window_size: tuple[int, ...] | None = None
    """Sliding window: tokens before and after a token (0) that it attends to; None for all."""
    window_attn_skip_freq: tuple[int, ...] | None = None
    """Whether each layer has the window (1 or 0); None for all layers."""
    swiglu: bool = True
    """SwiGLU MLP; without it a plain GELU MLP."""
    add_bias_linear: bool = False
    """Biases in all linears."""
    add_qkv_bias: bool = False
    """Biases in the QKV projection alone (Qwen 2)."""
    qk_layernorm: bool = False
    """Norms on queries and keys, per head (Qwen 3)."""
    untie_embeddings_and_output_weights: bool = False
    """A head with weights of its own."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    vocab_size: int | None = None
    """Vocabulary before padding; None takes the tokenizer's."""

    def architecture(self) -> dict[str, Any]:
        """What a checkpoint must agree with: every field that decides a parameter's shape or what
        the layers compute from it. Not among them: sequence lengths, initialisation, and the
        vocabulary, whose padded size is known only with the tokenizer."""
        free = {
            "seq_length",
            "max_position_embeddings",
            "init_method_std",
            "make_vocab_size_divisible_by",
            "vocab_size",
        }
        return {name: value for name, value in _plain(self).items() if name not in free}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut over devices, and what is recomputed instead of kept."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    sequence_parallel: bool = False
    """Cut norms and residuals along the sequence over the tensor-parallel ranks."""
    zero_stage: int = 3
    """DeepSpeed ZeRO stage, 0 to 3."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers, the modules in `recompute_modules`, or nothing."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With "full": every `recompute_num_layers` layers one unit, or only so many layers."""
    recompute_num_layers: int | None = None
    """Layers of one unit ("uniform") or layers recomputed ("block")."""
    recompute_modules: tuple[str, ...] = ()
    """With "selective": Megatron-core's names of the modules to recompute."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the learning rate. Counts are iterations."""

    lr: float
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: DecayStyle = "linear"
    """Shape of the decay; the names are Megatron's."""
    lr_decay_iters: int
    """Iteration at which `min_lr` is reached (default: `train_iters`)."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up, a given `--lr-warmup-fraction` of the decay included."""
    lr_warmup_init: float = 0.0
    """Learning rate at which warm-up starts."""
    lr_wsd_decay_style: WSDDecayStyle = "exponential"
    """Shape of WSD's final annealing."""
    lr_wsd_decay_iters: int | None = None
    """Length of WSD's final annealing."""
    override_opt_param_scheduler: bool = False
    """On resuming, take the schedule of the flags and not the checkpoint's."""
    use_checkpoint_opt_param_scheduler: bool = False
    """On resuming, take the checkpoint's schedule, whatever the flags say."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and norms have none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the denominator."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data sets and tokenizer. A blend is Megatron's list: one prefix, or weight, prefix, ..."""

    data_path: tuple[str, ...] = ()
    """Blend that `split` divides into training, validation and test; empty when
    `train_data_path` is given."""
    data_args_path: str | None = None
    """File that `data_path` was read from."""
    split: str | None = None
    """Shares of `data_path`, as "969,30,1"."""
    train_data_path: tuple[str, ...] = ()
    """Blend for training alone."""
    valid_data: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Blend of each validation set that has data of its own, by name, in the order given
    (`--valid-data-path` is named "valid"). The validation share of `split`, where it is above 0,
    is one more set, named "valid"."""
    data_cache_path: str | None = None
    """Folder for the index caches (default: beside the data)."""
    num_workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""
    tokenizer_type: TokenizerType
    """Kind of tokenizer."""
    tokenizer_model: str | None = None
    """SentencePiece file, or Hugging Face tokenizer folder; None for NullTokenizer."""
    trust_remote_code: bool = False
    """Run the code that a Hugging Face tokenizer comes with. What a checkpoint says of it is never
    followed."""
    reset_position_ids: bool = False
    """Positions start anew after each end of document."""
    reset_attention_mask: bool = False
    """No attention across the end of a document."""
    eod_mask_loss: bool = False
    """No loss on what follows an end-of-document token (on predicting from it)."""

    @property
    def data_path_flag(self) -> str:
        """Where `data_path` comes from, for messages."""
        if self.data_args_path is None:
            return "--data-path"
        return f"--data-args-path {self.data_args_path}"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where state comes from and goes to."""

    save: str | None = None
    """Folder for checkpoints and `metrics.jsonl`."""
    load: str | None = None
    """Folder of a checkpoint to go on from."""
    auto_resume: bool = False
    """Go on from `save` where it holds a checkpoint, whatever else says how to start."""
    save_interval: int | None = None
    """Iterations between checkpoints; None saves at the end only."""
    async_save: bool = False
    """Train on while files are written, from a copy in host memory."""
    keep_last: int | None = None
    """How many of the newest checkpoints stay; None keeps all."""
    keep_every: int | None = None
    """Checkpoints of iterations that are multiples of it stay too."""
    max_save_failures: int = 3
    """Saves in a row that fail before the run stops."""
    ckpt_step: int | None = None
    """Iteration of the checkpoint to load (default: the latest)."""
    no_load_optim: bool = False
    """Leave the optimizer's state in the checkpoint."""
    no_load_rng: bool = False
    """Leave the random states in the checkpoint."""
    load_hf: str | None = None
    """Hugging Face folder that gives the model's shape and, without `load`, its weights."""
    save_hf: str | None = None
    """Hugging Face folder to write at the end, or the folder of those of every save."""
    save_hf_every_save: bool = False
    """A Hugging Face folder at every save, named after the iteration."""
    save_hf_dtype: HFDtype | None = None
    """Type of the written weights; None takes that of `load_hf`'s config.json, else the run's."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported, and where."""

    log_interval: int = 100
    """Iterations between reports."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard (default: `<save>/tensorboard`; None without `save`)."""
    wandb_project: str | None = None
    """Weights & Biases project; None does not use it."""
    wandb_exp_name: str | None = None
    """Weights & Biases name of the run."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a run stops early, and what it does not put up with."""

    exit_interval: int | None = None
    """Save and stop after every so many iterations."""
    exit_duration_in_mins: float | None = None
    """Save and stop after so many minutes."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped because something was not finite."""
    loss_spike_threshold: float | None = None
    """Deviations above the running median from which on a loss is a spike; None looks for none."""
    rollback_on_spike: bool = False
    """Go back to the last checkpoint's weights after a spike, and leave out its data."""
    check_weight_hash_across_dp_replicas_interval: int = 500
    """Iterations between comparisons of what ranks hold copies of; 0 for none."""
    hang_timeout_minutes: float = 5.0
    """How long a rank may stay in one place of a step; 0 for ever."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything a run is told. `arguments.parse_args` has resolved all defaults."""

    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    watch: WatchConfig = field(default_factory=WatchConfig)
    sat: SATConfig | None = None
    """Sparsity-accelerated training; None trains dense."""
    sat_autotune: str | None = None
    """Measure which counts of heads and channels are fast, and keep the table in this file; empty:
    in none. None does not measure."""
    override_sat_schedule: bool = False
    """Go on with a SAT schedule other than the checkpoint's."""
    finetune: bool = False
    """A new stage: take the checkpoint's weights alone and start at iteration 0."""
    micro_batch_size: int
    """Sequences of one forward pass on one data-parallel rank."""
    global_batch_size: int
    """Sequences of one step over all data-parallel ranks and micro-batches."""
    train_iters: int
    """Optimizer steps of the run."""
    eval_interval: int = 1000
    """Iterations between evaluations."""
    eval_iters: int = 100
    """Steps' worth of data per evaluation and data set; 0 does not evaluate."""
    seed: int = 1234
    """Seed of initialisation and data order."""
    train_only: str | None = None
    """Regular expression found in the names of the parameters to train; the others are frozen.
    None trains all."""
    bf16: bool = False
    """Compute in bfloat16 with float32 master weights; otherwise float32."""
    attention_dropout: float = 0.0
    """Dropout on attention weights."""
    hidden_dropout: float = 0.0
    """Dropout on the outputs of attention and MLP."""
    deterministic_mode: bool = False
    """Only kernels whose results repeat bit for bit."""
    distributed_timeout_minutes: int = 10
    """How long a collective may wait; `arguments.parse_args` makes it what the watchdog allows."""
    deepspeed_config: dict[str, Any] = field(default_factory=dict)
    """The user's DeepSpeed JSON, as read; `build_deepspeed_config` completes it."""

    @property
    def params_dtype(self) -> torch.dtype:
        """Type of the parameters that the forward pass computes with."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def group_timeout_minutes(self) -> int:
        """Of torch's process groups. Where ranks are watched, `distributed_timeout_minutes` is the
        watchdog's, which says who was late: NCCL by itself ends the process that has waited."""
        minutes = self.distributed_timeout_minutes
        watched = self.watch.hang_timeout_minutes > 0
        return minutes + (_AFTER_WATCHDOG if watched else 0)

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks among `world_size`."""
        return world_size // self.parallel.tensor_model_parallel_size

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of one step on each data-parallel rank."""
        return self.global_batch_size // (
            self.micro_batch_size * self.data_parallel_size(world_size)
        )

    def architecture(self) -> dict[str, Any]:
        """`ModelConfig.architecture`: what must be equal in a checkpoint to load."""
        return self.model.architecture()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: nested dictionaries, lists, strings, numbers, booleans, None."""
        values: dict[str, Any] = _plain(self)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. ValueError on a field that this version does not know."""
        config: Self = _build(cls, values)
        return config


def _plain(value: Any) -> Any:
    if isinstance(value, SATConfig):
        return value.to_dict()
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _build(kind: Any, values: Any) -> Any:
    """Make a value of the annotated type `kind` from its plain form."""
    if kind is SATConfig:
        return SATConfig.from_dict(values)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(values) - set(hints))
        if unknown:
            raise ValueError(
                f"{kind.__name__} has no field {', '.join(unknown)}; its fields are "
                f"{', '.join(hints)}"
            )
        return kind(**{name: _build(hints[name], item) for name, item in values.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if values is None:
            return None
        return _build(next(choice for choice in arguments if choice is not type(None)), values)
    if origin is tuple:
        return tuple(values)
    if origin is dict:
        return {key: _build(arguments[1], item) for key, item in values.items()}
    return values

"""A run from its command line to its end: builds what the loop needs, in the order in which
mistakes can be found soonest."""

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import megatron.core
import torch
import torch.distributed as dist

import megatron_sat
from megatron_sat.checkpoint.hf_import import HFWeights
from megatron_sat.state import SATState
from megatron_sat.training.autotune import autotune, check_resumed
from megatron_sat.training.checkpoint import (
    Progress,
    StoredCheckpoint,
    check_compatible,
    load_checkpoint,
)
from megatron_sat.training.checkpoint_arguments import check_paths
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.data import build_datasets
from megatron_sat.training.deepspeed_config import build_deepspeed_config
from megatron_sat.training.display import Display, open_display
from megatron_sat.training.hf import (
    check_exports,
    check_vocabulary,
    load_weights,
    open_weights,
    tokenizer_vocab_size,
)
from megatron_sat.training.initialize import initialize, ranks_agree, start
from megatron_sat.training.launch import idle_tasks
from megatron_sat.training.learning_rate import LearningRate
from megatron_sat.training.loop import Trainer
from megatron_sat.training.metrics import MetricsSinks, open_sinks
from megatron_sat.training.model import build_engine, build_model, padded_vocab_size
from megatron_sat.training.offloading import check_parameter_buffers
from megatron_sat.training.reshard import Resharding, other_subsets, plan_resharding
from megatron_sat.training.resume import (
    auto_resume,
    check_data,
    check_save_folder,
    check_settings,
    comparable_losses,
    continues,
    is_done,
    notes_on_resume,
    set_aside,
    total_samples,
)
from megatron_sat.training.run_file import settings_lines, write_run_file
from megatron_sat.training.save_lock import SaveLock
from megatron_sat.training.search import find_checkpoint
from megatron_sat.training.step_flops import model_shape, step_flops
from megatron_sat.training.stop import Signals, Stopping
from megatron_sat.training.tokenizer import build_tokenizer
from megatron_sat.training.topology import Topology
from megatron_sat.training.validation import check_sat_layout
from megatron_sat.training.watchdog import Watchdog

_PARTS = {"attention": "attention", "mlp": "MLP"}


def pretrain(argv: Sequence[str] | None = None) -> Trainer | None:
    """Continue a pre-training as the command line says (``sys.argv`` by default).

    Every rank calls this. A mistake of the user's is raised on all ranks, before training starts
    and with nothing written: see :func:`megatron_sat.training.initialize.run`. Returns the trainer
    after its last step; None where ``--auto-resume`` finds all steps done.
    """
    started = time.monotonic()
    with Signals() as signals:
        config = start(argv)
        signals.rank = dist.get_rank()
        stopping = Stopping(
            signals=signals,
            exit_interval=config.watch.exit_interval,
            exit_duration_in_mins=config.watch.exit_duration_in_mins,
            started=started,
        )
        stall = config.watch.hang_timeout_minutes * 60
        patience = config.distributed_timeout_minutes * 60
        save = config.checkpoint.save
        with (
            SaveLock(save) as lock,
            Watchdog(stall=stall, patience=patience, folder=save) as watchdog,
        ):
            return _pretrain(config, stopping, watchdog, lock)


def _pretrain(
    config: TrainingConfig, stopping: Stopping, watchdog: Watchdog, lock: SaveLock
) -> Trainer | None:
    """`pretrain`, watched."""
    at = functools.partial(watchdog.at, slow=True)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    at("waiting for the --save folder")
    with ranks_agree("waiting for the --save folder"):
        if rank == 0:
            lock.take()
    config = auto_resume(config)  # a run that still ends may have left a checkpoint until then
    at("checking the configuration")
    stored: StoredCheckpoint | None = None
    weights: HFWeights | None = None
    resharding: Resharding | None = None
    with ranks_agree("checking the configuration"):
        resuming = config.checkpoint.load is not None and not config.finetune
        check_sat_layout(config, resuming=resuming)
        deepspeed_config = build_deepspeed_config(config, world_size=world_size)
        check_paths(config, rank=rank)
        if rank == 0:
            check_save_folder(config)
        tokenizer = build_tokenizer(
            config.data.tokenizer_type,
            config.data.tokenizer_model,
            tokenizer_vocab_size(config),
            trust_remote_code=config.data.trust_remote_code,
        )
        check_vocabulary(config, tokenizer)
        vocab_size = config.model.vocab_size or tokenizer.vocab_size
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
        padded_vocab = _padded_vocab(config, vocab_size)
        check_parameter_buffers(
            deepspeed_config,
            config,
            data_parallel=config.data_parallel_size(world_size),
            padded_vocab=padded_vocab,
        )
    if config.checkpoint.load is not None:
        stored = find_checkpoint(
            config.checkpoint.load,
            iteration=config.checkpoint.ckpt_step,
            check=functools.partial(_check_stored, config=config, resuming=resuming),
            together=True,
            watchdog=watchdog,
        )
        if is_done(stored, config):
            if rank == 0:
                print(f" nothing is left to do: {stored.folder} has all {config.train_iters} steps")
            return None
    at("checking the checkpoint")
    with ranks_agree("checking the checkpoint"):
        if stored is not None:
            resharding = plan_resharding(
                stored, config, world_size=world_size, padded_vocab=padded_vocab
            )
        elif config.checkpoint.load_hf is not None:
            weights = open_weights(config, padded_vocab=padded_vocab)
        if rank == 0:  # it writes them, where others may have other folders
            check_exports(
                config,
                padded_vocab=padded_vocab,
                iteration=stored.progress.iteration if stored is not None and resuming else 0,
                continues=continues(config),
            )
    at("making the process groups")
    initialize(config)
    topology = Topology.gather()
    with ranks_agree("looking at the devices"):
        topology.check()
    check, samples = None, None
    if stored is not None and resuming:
        check = functools.partial(check_data, stored, config)
        samples = total_samples(stored.progress, config)
    datasets = build_datasets(config, tokenizer, samples=samples, check=check, watchdog=watchdog)

    at("looking for the table of --sat-autotune")
    tuned = autotune(
        config,
        stored if resuming else None,
        on_rate=lambda rate: at(f"measuring rate {rate:.3f} for --sat-autotune"),
    )
    state = SATState(config.sat)
    at("building the model")
    model = build_model(config, state, padded_vocab=padded_vocab, deepspeed_config=deepspeed_config)
    at("loading the weights")
    if weights is not None:
        load_weights(model, weights)
    if resharding is not None:
        resharding.load_model(model)
    at("building the optimizer")
    engine = build_engine(model, config, deepspeed_config=deepspeed_config)
    learning_rate = LearningRate(engine.optimizer, config.optimizer)
    progress = Progress()
    at("loading the checkpoint")
    if stored is not None:
        progress = load_checkpoint(
            engine, stored, config=config, state=state, resharding=resharding
        )
        progress = comparable_losses(progress, stored, datasets.described)
        with ranks_agree("continuing the learning-rate schedule"):
            if not config.finetune:
                learning_rate.load_state_dict(
                    stored.run_state["scheduler"], iteration=progress.iteration
                )

    if tuned is not None:
        with ranks_agree("taking the counts of --sat-autotune"):
            state.set_kept_counts(tuned.kept_counts)

    sinks, display = MetricsSinks([]), Display()
    run_file: Path | None = None
    left_behind: list[str] = []
    at("opening the logs")
    with ranks_agree("opening the logs"):
        if rank == 0:
            left_behind = set_aside(stored, config)
            sinks = open_sinks(
                config.logging,
                save=config.checkpoint.save,
                start_iteration=progress.iteration,
                settings=config.to_dict(),
            )
            if config.checkpoint.save is not None:
                run_file = write_run_file(
                    config.checkpoint.save,
                    iteration=progress.iteration,
                    config=config,
                    deepspeed_config=deepspeed_config,
                    topology=topology,
                    selection_groups=None if config.sat is None else state.selection_groups,
                )
    if rank == 0:
        shape = model_shape(config, padded_vocab)
        schedule = state.schedule

        def step_work(step: int) -> float:
            rate = 0.0 if schedule is None else schedule.rate(step)
            return float(step_flops(config, shape, state, tokens=1, rate=rate))

        display = open_display(
            total_iterations=config.train_iters,
            start_iteration=progress.iteration,
            step_work=step_work,
        )
    with display:
        display.message(_describe(config, state, engine, topology, stored, progress, resharding))
        display.message("\n".join(settings_lines(config, deepspeed_config)))
        if run_file is not None:
            display.message(f" versions, places of the ranks and all settings: {run_file}")
        for line in left_behind:
            display.message(f" {line}")
        if tuned is not None:
            display.message("\n".join(tuned.lines()))
        if stored is not None and resuming:
            for note in notes_on_resume(stored, config, datasets.described):
                display.message(f" {note}")
        try:
            trainer = Trainer(
                config,
                engine=engine,
                state=state,
                datasets=datasets,
                learning_rate=learning_rate,
                progress=progress,
                padded_vocab_size=padded_vocab,
                sinks=sinks,
                display=display,
                last_saved=stored.folder if stored is not None and resuming else None,
                stopping=stopping,
                watchdog=watchdog,
            )
            trainer.train()
            at("closing the logs")
        finally:
            sinks.close()
    return trainer


def _check_stored(stored: StoredCheckpoint, *, config: TrainingConfig, resuming: bool) -> None:
    check_compatible(stored, config)
    if resuming:
        check_settings(stored, config)
        check_resumed(config, stored)


def _padded_vocab(config: TrainingConfig, vocab_size: int) -> int:
    return padded_vocab_size(
        vocab_size,
        divisible_by=config.model.make_vocab_size_divisible_by,
        tensor_parallel=config.parallel.tensor_model_parallel_size,
    )


def _describe(
    config: TrainingConfig,
    state: SATState,
    engine: Any,
    topology: Topology,
    stored: StoredCheckpoint | None,
    progress: Progress,
    resharding: Resharding | None,
) -> str:
    """What runs, in a few lines."""
    parallel, world_size = config.parallel, dist.get_world_size()
    parameters = sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for parameter in engine.module.parameters()
    )
    devices = " and ".join(f"{count} x {kind}" for kind, count in topology.devices().items())
    groups = "" if config.sat is None else f", selection groups {state.selection_groups}"
    lines = [
        f" megatron_sat {megatron_sat.__version__}, torch {torch.__version__}, "
        f"DeepSpeed {deepspeed.__version__}, Megatron-core {megatron.core.__version__}",
        f" {devices}: data parallel {config.data_parallel_size(world_size)}, "
        f"tensor parallel {parallel.tensor_model_parallel_size}"
        f"{' with sequence parallel' if parallel.sequence_parallel else ''}, "
        f"ZeRO stage {parallel.zero_stage}, {'bfloat16' if config.bf16 else 'float32'}{groups}",
        *topology.lines(),
        f" {parameters / 1e6:.1f}M parameters per tensor-parallel rank; "
        f"{config.global_batch_size} sequences of {config.model.seq_length} tokens a step, "
        f"{config.gradient_accumulation_steps(world_size)} micro-batches on each rank",
    ]
    if idle_tasks():
        lines.append(
            f" WARNING: one process, and {idle_tasks()} more tasks of this SLURM job are idle; "
            "srun starts them all"
        )
    if config.train_only is not None:
        trained = sum(
            getattr(parameter, "ds_numel", parameter.numel())
            for parameter in engine.module.parameters()
            if parameter.requires_grad
        )
        lines.append(f" {trained / 1e6:.1f}M of them are trained: --train-only {config.train_only}")
    if config.sat is None:
        lines.append(" dense training (no --sat-omission-rate)")
    else:
        sat = config.sat
        assert state.schedule is not None
        schedule, *notes = state.schedule.describe()
        lines.append(
            f" sparsity-accelerated training: {schedule}; {sat.metric}, {sat.selection}, "
            f"{' and '.join(sat.modules)}"
        )
        lines += [f" {note}" for note in notes]
        left_out = state.effective_rates_at(sat.omission_rate)
        lines.append(
            f" as it runs, that leaves out {left_out['attention']:.3f} of the heads and "
            f"{left_out['mlp']:.3f} of the channels"
        )
        if any(state.kept_count(module, sat.omission_rate) for module in sat.modules):
            lines.append(" heads and channels are counted as --sat-autotune found them fast")
        elif sat.omission_rate > 0.0:
            lines += [
                f" WARNING: nothing is left out of the {_PARTS[module]} at this rate: {why}"
                for module, why in (
                    ("attention", "its query groups have too few heads"),
                    (
                        "mlp",
                        f"--sat-channel-multiple {sat.channel_multiple} is too coarse for its "
                        f"{config.model.ffn_hidden_size} channels; give a smaller one",
                    ),
                )
                if module in sat.modules and not left_out[module]
            ]
    if stored is None and config.checkpoint.load_hf is not None:
        lines.append(f" weights of {config.checkpoint.load_hf}")
    if stored is not None:
        how = "weights of" if config.finetune else "continuing"
        lines.append(f" {how} {stored.folder}, at iteration {progress.iteration}")
        if resharding is not None:
            lines.append(f" {resharding.describe()}")
        if (note := other_subsets(stored, config, world_size=world_size)) is not None:
            lines.append(f" {note}")
    return "\n".join(lines)

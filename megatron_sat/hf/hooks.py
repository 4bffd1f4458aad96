"""What happens ahead of a training forward: counting micro-batches, and deciding subsets.

These are forward pre-hooks: the modules of transformers run their own forward, with linears that
return fewer heads or channels.
"""

import datetime
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_sat import importance
from megatron_sat.communication import reduce_statistic
from megatron_sat.hf.linear import SATColumnLinear
from megatron_sat.site import Site
from megatron_sat.state import SATState

# The first parameters of every model's forward, for callers that give them by position.
_PARAMETERS = ("input_ids", "attention_mask", "position_ids", "past_key_values")


class StatisticGroup:
    """All ranks of the job, in a process group of their own: on the default one, statistics would
    queue behind ZeRO-3's parameter gathers."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    def connect(self, *, timeout: datetime.timedelta | None = None) -> None:
        """Make the group, if there are several ranks and it is not made yet. Collective.

        ``timeout``: of its collectives; None is torch's default.
        """
        if self._group is None and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(timeout=timeout)

    def reduce(self, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Sum both over the ranks: see :func:`megatron_sat.communication.reduce_statistic`."""
        self.connect()
        return reduce_statistic(total, count, self._group)

    def close(self) -> None:
        """End the group. Every rank of the job calls this."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_group": None}  # a copied or loaded model makes its own


class MicroBatchHook:
    """Ahead of the model's training forward: the next micro-batch, and which tokens count."""

    def __init__(self, state: SATState) -> None:
        self.state = state
        # Forwards since the last backward pass that recomputed: see `check_recomputation`.
        self._forwards = 0
        self._recomputed = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if module.training:
            self._begin(dict(zip(_PARAMETERS, args, strict=False)) | dict(kwargs))

    @torch.compiler.disable
    def _begin(self, arguments: Mapping[str, Any]) -> None:
        state = self.state
        if state.step is None:
            raise RuntimeError(
                "a training forward before the first step: give SATCallback(config) to the "
                "Trainer; a loop of your own calls begin_step(step), counted from 1, on what "
                "enable_sat returned"
            )
        if state.rate > 0.0:
            _refuse_filled_cache(arguments.get("past_key_values"))
        if not torch.is_grad_enabled():
            if state.micro_batch is not None:
                return  # recomputation in a backward pass to come needs the subsets that are there
        elif self._recomputed:
            self._forwards, self._recomputed = 1, False
        else:
            self._forwards += 1
        index = 0 if state.micro_batch is None else state.micro_batch + 1
        state.begin_micro_batch(index, _token_mask(arguments.get("attention_mask")))

    def check_recomputation(self) -> None:
        """RuntimeError in a recomputation whose subset is no longer there.

        With scope "micro-batch" a second forward replaces the subsets of the first; nothing tells
        recomputed layers of which forward they are.
        """
        if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
            return
        self._recomputed = True
        if self.state.require_config().scope == "micro-batch" and self._forwards > 1:
            raise RuntimeError(
                f'scope="micro-batch" with gradient checkpointing: {self._forwards} forwards '
                'before one backward, but subsets are kept for the last; use scope="step"'
            )


class SubsetHook:
    """Ahead of the forward of one attention or MLP: decides what it leaves out, once a step.

    ``columns``: names of its linears whose rows are scored. ``key_value_groups``: for an attention,
    its ``num_key_value_groups``, the query heads of each group.
    """

    def __init__(
        self,
        site: Site,
        columns: Sequence[str],
        *,
        group: StatisticGroup,
        micro_batches: MicroBatchHook,
        key_value_groups: int | None = None,
    ) -> None:
        self.site = site
        self.columns = tuple(columns)
        self.group = group
        self.micro_batches = micro_batches
        self.key_value_groups = key_value_groups

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if module.training:
            self._prepare(module, args[0] if args else kwargs["hidden_states"])
            return
        if self.key_value_groups is not None:
            module.num_key_value_groups = self.key_value_groups
        if hasattr(getattr(module, self.columns[0]).weight, "ds_id"):  # partitioned by ZeRO-3
            self._visit(module, _nothing)

    @torch.compiler.disable
    @torch.no_grad()
    def _prepare(self, module: Any, hidden_states: Tensor) -> None:
        site = self.site
        self.micro_batches.check_recomputation()
        decides = site.is_sparse and site.subset is None
        if decides:
            # Sums and scores are float32, whatever autocast makes of products.
            with torch.autocast(hidden_states.device.type, enabled=False):
                total, count = self._statistic(hidden_states)
                scores = self._visit(module, functools.partial(_unit_scores, total, count))
                site.decide(self._site_scores(scores))
        else:
            self._visit(module, _nothing)
        if self.key_value_groups is not None:
            sparse = site.is_grouped_query and site.is_sparse
            module.num_key_value_groups = (
                site.kept_per_group(site.state.rate) if sparse else self.key_value_groups
            )

    def _visit(self, module: nn.Module, read: Any) -> list[Any]:
        """Call ``read`` with each of the linears, inside that linear's own call."""
        results = []
        for name in self.columns:
            linear = getattr(module, name)
            if not isinstance(linear, SATColumnLinear):
                raise TypeError(
                    f"{name} of {self.site.name} has been replaced by a "
                    f"{type(linear).__module__}.{type(linear).__qualname__} since enable_sat; call "
                    "enable_sat last, on what it supports"
                )
            results.append(linear(read=read))
        return results

    def _statistic(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        metric = self.site.state.require_config().metric
        if not importance.needs_statistic(metric):
            return None, None
        mask = self.site.state.token_mask
        return self.group.reduce(*importance.statistic(metric, hidden_states, mask))

    def _site_scores(self, scores: Sequence[Tensor]) -> Tensor:
        """``[units]`` float32 of the scores of each linear's units: of a head the mean of Q, K and
        V, K and V being its group's (equation 7), of a channel the mean of gate and up."""
        groups = min(score.numel() for score in scores)
        shared = self.site.units // groups
        spread = [score.view(groups, -1).expand(groups, shared) for score in scores]
        return torch.stack(spread).mean(dim=0).flatten()


def _unit_scores(total: Tensor | None, count: Tensor | None, linear: SATColumnLinear) -> Tensor:
    """``[units of this linear]`` float32, each the mean over its rows (equation 6)."""
    metric = linear.site.state.require_config().metric
    return importance.unit_score(metric, linear.weight, total, count, unit=linear.unit)


def _nothing(_: SATColumnLinear) -> None:
    """For calls that only keep the order: DeepSpeed's ZeRO-3 fetches ahead as long as modules run
    in the same order at every step."""


def _token_mask(attention_mask: Any) -> Tensor | None:
    """``[b, s]`` bool of the usual mask of padding, nonzero where there is a token.

    Other masks (of four dimensions, flex attention's, none at all in a batch without padding) say
    which token sees which, not which are padding: every token counts.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask != 0
    return None


def _refuse_filled_cache(past_key_values: Any) -> None:
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError(
            "a training forward with keys and values in past_key_values: other steps left out "
            "other heads; call model.eval() to generate"
        )

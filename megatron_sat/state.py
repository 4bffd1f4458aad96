"""What is true for the current training step: the rate, the sites and their subsets.

A *site* is one place where units are left out: the query heads of one attention, or the channels
of one MLP. The layers ask their site for the subset of this step; the trainer tells the state which
step it is. Nothing here communicates: the layers bring scores that are already equal on all ranks.
"""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sat.config import Module, SATConfig
from megatron_sat.schedule import OmissionSchedule
from megatron_sat.selection import draw_noise, noise_seed
from megatron_sat.site import Site

logger = logging.getLogger(__name__)

# By omission rate: how many units of each module take part, over all tensor-parallel ranks.
KeptCounts = Mapping[float, Mapping[Module, int]]


class SATState:
    """The state of sparsity-accelerated training, shared by the trainer and all layers.

    ``config``: None trains dense throughout. The caller announces each optimizer step with
    :meth:`begin_step` and each micro-batch with :meth:`begin_micro_batch`; every site decides in
    its first training forward after that, and every later call, activation recomputation included,
    reads the stored subset.
    """

    def __init__(self, config: SATConfig | None) -> None:
        self.config = config
        self.schedule = None if config is None else OmissionSchedule.from_config(config)
        self.sites: dict[str, Site] = {}
        self.step: int | None = None
        self.micro_batch: int | None = None
        self.token_mask: Tensor | None = None
        self._rate = 0.0
        self._selection_groups = None if config is None else config.selection_groups
        self._noise: dict[str, Tensor] = {}
        self._warned = False
        self._kept_counts: KeptCounts = {}

    def require_config(self) -> SATConfig:
        """The configuration; only for callers that run sparse, so that there is one."""
        assert self.config is not None
        return self.config

    # Sites

    def is_sparse_module(self, module: Module) -> bool:
        """Whether the configuration leaves units of ``module`` out."""
        return self.config is not None and module in self.config.modules

    def register_site(
        self,
        *,
        module: Module,
        layer: int,
        units: int,
        query_groups: int = 1,
        tensor_parallel_rank: int = 0,
        tensor_parallel_size: int = 1,
    ) -> Site | None:
        """Make the site of one attention (``units`` query heads over ``query_groups`` KV groups)
        or MLP (``units`` channels) of layer number ``layer``.

        None where the configuration leaves this module dense. ValueError if the layer is there
        already (a state belongs to one model) or if the selection groups do not fit its units.
        """
        if not self.is_sparse_module(module):
            return None
        if self._selection_groups is None:
            self._selection_groups = tensor_parallel_size
        site = Site(
            self,
            module=module,
            layer=layer,
            units=units,
            query_groups=query_groups,
            tensor_parallel_rank=tensor_parallel_rank,
            tensor_parallel_size=tensor_parallel_size,
        )
        if site.name in self.sites:
            raise ValueError(
                f"layer {layer} has its {module} site already: an SATState belongs to one model; "
                "make a new one for another model"
            )
        self._check_groups(site)
        self._warn_of_unequal_work(tensor_parallel_size)
        self.sites[site.name] = site
        return site

    @property
    def selection_groups(self) -> int:
        """The number of groups with equal shares: the configuration's, a resumed run's, or the
        tensor-parallel size."""
        return self._selection_groups or 1

    def _check_groups(self, site: Site) -> None:
        groups = self.selection_groups
        what, size = "channels", site.units
        if site.module == "attention":
            what, size = "query groups" if site.is_grouped_query else "heads", site.query_groups
        if size % groups:
            raise ValueError(
                f"selection_groups={groups} does not divide the {size} {what} of the "
                f"{site.module} in layer {site.layer}; use a divisor of {size}"
            )

    # Steps

    def begin_step(self, step: int) -> None:
        """Announce optimizer step ``step``, counted from 1. Forgets the subsets of the last."""
        self._rate = 0.0 if self.schedule is None else self.schedule.rate(step)
        self.step = step
        self.micro_batch = None
        self.token_mask = None
        self._forget()

    def begin_micro_batch(self, index: int, token_mask: Tensor | None = None) -> None:
        """Announce micro-batch ``index`` of the step, counted from 0.

        ``token_mask``: ``[b, s]`` bool, true where a token counts for the scores; None if all do.
        RuntimeError before :meth:`begin_step`.
        """
        if self.step is None:
            raise RuntimeError("begin_micro_batch() before begin_step(): announce the step first")
        self.micro_batch = index
        self.token_mask = token_mask
        if self.config is not None and self.config.scope == "micro-batch":
            self._forget()

    def reset(self) -> None:
        """Forget steps, subsets and static rankings: a training starts anew."""
        self.step = None
        self._forget()
        for site in self.sites.values():
            site.ranking = None

    @property
    def rate(self) -> float:
        """The omission rate of the announced step. RuntimeError before :meth:`begin_step`."""
        if self.step is None and self.config is not None:
            raise RuntimeError(
                "a training forward before SATState.begin_step(step): announce each step, and "
                "call model.eval() for evaluation"
            )
        return self._rate

    def _forget(self) -> None:
        self._noise.clear()
        for site in self.sites.values():
            site.subset = site.sums = None

    def noise(self, site: Site, device: torch.device) -> Tensor:
        """Gumbel noise ``[units]`` float32 of ``site`` for this step (or micro-batch), equation 8.

        Drawn from (seed, step, micro-batch, layer, module) alone, so that every rank has the same
        and a resumed run needs no state; for all sites at once.
        """
        if site.name not in self._noise:
            self._draw(device)
        return self._noise[site.name]

    def _draw(self, device: torch.device) -> None:
        config = self.require_config()
        assert self.step is not None
        micro_batch = 0
        if config.scope == "micro-batch":
            if self.micro_batch is None:
                raise RuntimeError(
                    'scope="micro-batch" needs begin_micro_batch(index) before each forward'
                )
            micro_batch = self.micro_batch
        seeds = [
            noise_seed(config.seed, self.step, micro_batch, site.layer, site.module)
            for site in self.sites.values()
        ]
        sizes = [site.units for site in self.sites.values()]
        parts = draw_noise(seeds, sizes, device=device)
        self._noise = dict(zip(self.sites, parts, strict=True))

    # How many

    def set_kept_counts(self, counts: KeptCounts) -> None:
        """How many units take part at the given rates, in place of the rounded shares; at other
        rates those. All of a module's units are its dense form.

        After the layers are built. ValueError for a count that a site does not have or that its
        groups cannot share equally.
        """
        for rate, by_module in counts.items():
            for site in self.sites.values():
                count = by_module.get(site.module, site.units)
                if not 0 < count <= site.units or count % site.groups:
                    raise ValueError(
                        f"{count} units of {site.name} are to take part at rate {rate}; valid: a "
                        f"multiple of its {site.groups} groups, up to {site.units}"
                    )
        self._kept_counts = {rate: dict(by_module) for rate, by_module in counts.items()}
        for site in self.sites.values():
            site.forget_count()

    def kept_count(self, module: Module, rate: float) -> int | None:
        """The count that was set for a module at a rate, if one was."""
        return self._kept_counts.get(rate, {}).get(module)

    # What ran

    def kept_units(self, rate: float) -> dict[str, int | None]:
        """How many heads and channels of a layer take part at omission ``rate``, after rounding,
        over all tensor-parallel ranks; None where nothing is left out."""
        kept: dict[str, int | None] = {"attention": None, "mlp": None}
        if rate > 0.0:
            # All layers are alike, and so are their sites.
            for site in {site.module: site for site in self.sites.values()}.values():
                count = site.kept_per_group(rate) * site.groups
                kept[site.module] = count if count < site.units else None
        return kept

    def effective_rates(self) -> dict[str, float]:
        """The share of units left out in this step after rounding, by module; 0.0 where dense."""
        return self.effective_rates_at(self._rate)

    def effective_rates_at(self, rate: float) -> dict[str, float]:
        """The share of units left out at omission ``rate`` after rounding, by module."""
        rates: dict[str, float] = {"attention": 0.0, "mlp": 0.0}
        kept = self.kept_units(rate)
        for site in self.sites.values():
            rates[site.module] = 1.0 - (kept[site.module] or site.units) / site.units
        return rates

    def checksum(self) -> str | None:
        """16 hexadecimal digits over the chosen units of all sites; None when dense.

        Equal on all ranks of a healthy run. Waits for the device.
        """
        digest = hashlib.blake2b(digest_size=8)
        chosen = [(site.name, site.subset) for site in self.sites.values() if site.subset]
        for name, subset in sorted(chosen, key=lambda item: item[0]):
            digest.update(name.encode())
            digest.update(subset.units.cpu().numpy().tobytes())
        return digest.hexdigest() if chosen else None

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: the configuration, the last step, the selection groups as resolved,
        counts that were set and, for static selection, each site's ranking
        ``[groups, units / groups]`` int64."""
        return {
            "config": None if self.config is None else self.config.to_dict(),
            "step": self.step,
            "selection_groups": self._selection_groups,
            "kept_counts": [
                {"rate": rate, **by_module} for rate, by_module in self._kept_counts.items()
            ],
            "rankings": {
                name: site.ranking.cpu()
                for name, site in self.sites.items()
                if site.ranking is not None
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where another state stopped, after the layers are built.

        Takes the stored counts (:func:`stored_counts`), and the stored selection groups unless the
        configuration names its own; if these are not a multiple of the tensor-parallel size, ranks
        get unequal work, with one warning. The next call is ``begin_step(stored step + 1)``.
        ValueError if stored rankings do not fit.
        """
        self.step = None
        self._forget()
        stored_groups = state_dict["selection_groups"]
        if self.config is None:
            return
        if self.config.selection_groups is None and stored_groups is not None:
            self._selection_groups = stored_groups
        for site in self.sites.values():
            site.forget_count()
            self._check_groups(site)
        if counts := stored_counts(state_dict, self.config):
            self.set_kept_counts(counts)
        self._load_rankings(state_dict["rankings"])
        self._warn_of_unequal_work(
            max((site.tensor_parallel_size for site in self.sites.values()), default=1)
        )

    def _warn_of_unequal_work(self, tensor_parallel: int) -> None:
        if self.selection_groups % tensor_parallel and not self._warned:
            self._warned = True
            if dist.is_initialized() and dist.get_rank() != 0:
                return  # one line of a run, not of each rank
            logger.warning(
                "selection_groups=%d is not a multiple of the tensor-parallel size %d: ranks get "
                "unequal work",
                self.selection_groups,
                tensor_parallel,
            )

    def _load_rankings(self, rankings: dict[str, Tensor]) -> None:
        if self.require_config().selection != "static":
            return
        for name, ranking in rankings.items():
            site = self.sites.get(name)
            if site is None:
                raise ValueError(f"the stored ranking of {name} has no site in this model")
            expected = (site.groups, site.units // site.groups)
            if tuple(ranking.shape) != expected:
                raise ValueError(
                    f"the stored ranking of {name} has shape {tuple(ranking.shape)}, this run "
                    f"needs {expected}: keep selection_groups as in the stored run"
                )
            site.ranking = ranking.clone()


def stored_counts(state_dict: dict[str, Any], config: SATConfig) -> KeptCounts:
    """The set counts in a state's ``state_dict()``, if a state of ``config`` goes on with them: not
    where they were set for other modules, multiples or selection groups."""
    was = state_dict["config"]
    if was is None or not state_dict.get("kept_counts"):
        return {}
    groups = config.selection_groups
    if groups is not None and groups != state_dict["selection_groups"]:
        return {}
    now = config.to_dict()
    if any(was[name] != now[name] for name in ("modules", "channel_multiple")):
        return {}
    return {
        float(counts["rate"]): {module: counts[module] for module in config.modules}
        for counts in state_dict["kept_counts"]
    }

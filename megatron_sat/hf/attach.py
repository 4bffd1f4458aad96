"""Putting SAT on a loaded model of transformers, and taking it off."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from megatron_sat.config import SATConfig
from megatron_sat.hf.families import (
    ATTENTION_COLUMNS,
    ATTENTION_ROW,
    MLP_COLUMNS,
    MLP_ROW,
    Layer,
    check_forward,
    check_layers,
    find_base_model,
)
from megatron_sat.hf.hooks import MicroBatchHook, StatisticGroup, SubsetHook
from megatron_sat.hf.linear import SATColumnLinear, SATRowLinear
from megatron_sat.site import Site
from megatron_sat.state import SATState

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_megatron_sat"


def enable_sat(model: nn.Module, config: SATConfig) -> SATState:
    """Train a model of transformers under SAT: Llama, Mistral, Qwen2 (and 2.5), Qwen3.

    In training mode its attention and MLP modules then run the heads and channels of this step's
    subsets (equations 9, 10). Parameters, their names, ``state_dict`` and ``save_pretrained`` stay
    as they are, and ``model.eval()`` is dense. Attention goes through transformers' attention
    interface, as the model was loaded. Call it once the model is loaded, on every rank, and ahead
    of making the Trainer, which also takes ``SATCallback(config)``; :func:`disable_sat` undoes it.

    Returns:
        The state of the training, for a loop without the Trainer: it calls ``begin_step(step)``
        before each optimizer step, counted from 1. Micro-batches are counted, and padding is read
        from ``attention_mask``, in the model's forward.

    Raises:
        TypeError: the model is of another architecture, or its layers are not transformers' own
            (adapters, quantised layers, replaced forwards); names what is in the way.
        ValueError: the model has SAT already, or the configuration does not fit it.
    """
    base = find_base_model(model)
    if find_attachment(base) is not None:
        raise ValueError("enable_sat was called on this model before; call disable_sat first")
    layers = check_layers(base)
    attachment = Attachment(config, base.config, layers)
    attachment.attach(base)
    setattr(base, _ATTRIBUTE, attachment)
    return attachment.state


def disable_sat(model: nn.Module) -> None:
    """Make a model what it was before :func:`enable_sat`; every rank calls it.

    Its weights stay as trained. Without SAT on it, nothing happens.
    """
    for module in model.modules():
        attachment = module.__dict__.get(_ATTRIBUTE)
        if attachment is not None:
            attachment.detach()
            delattr(module, _ATTRIBUTE)


def find_attachment(model: nn.Module) -> "Attachment | None":
    """What `enable_sat` put on a model, or on one that ``model`` wraps."""
    for module in model.modules():
        attachment: Attachment | None = module.__dict__.get(_ATTRIBUTE)
        if attachment is not None:
            return attachment
    return None


class _Holder(NamedTuple):
    """A module with a site: an attention or an MLP."""

    name: str
    module: Any
    site: Site
    columns: Sequence[str]
    row: str
    unit: int


class Attachment:
    """A model's state under SAT, and all that `detach` takes off again."""

    def __init__(self, config: SATConfig, model_config: Any, layers: Sequence[Layer]) -> None:
        """Makes the sites of ``layers``, and leaves the model alone.

        ValueError for a ``config`` that does not fit.
        """
        self.config = config
        self.state = SATState(config)
        self.group = StatisticGroup()
        self._holders: list[_Holder] = []
        for layer in layers:
            name = f"layers.{layer.number - 1}"
            attention = self.state.register_site(
                module="attention",
                layer=layer.number,
                units=model_config.num_attention_heads,
                query_groups=model_config.num_key_value_heads,
            )
            if attention is not None:
                self._holders.append(
                    _Holder(
                        f"{name}.self_attn",
                        layer.attention,
                        attention,
                        ATTENTION_COLUMNS,
                        ATTENTION_ROW,
                        layer.attention.head_dim,
                    )
                )
            mlp = self.state.register_site(
                module="mlp", layer=layer.number, units=model_config.intermediate_size
            )
            if mlp is not None:
                self._holders.append(
                    _Holder(f"{name}.mlp", layer.mlp, mlp, MLP_COLUMNS, MLP_ROW, 1)
                )
        _check_fit(self.state)
        self._linears: list[tuple[_Holder, str, nn.Linear]] = []
        self._hooks: list[Any] = []

    def attach(self, base: Any) -> None:
        """Hooks, and the linears' classes."""
        micro_batches = MicroBatchHook(self.state)
        self._hooks.append(base.register_forward_pre_hook(micro_batches, with_kwargs=True))
        for holder in self._holders:
            module, site = holder.module, holder.site
            is_attention = site.module == "attention"
            hook = SubsetHook(
                site,
                holder.columns,
                group=self.group,
                micro_batches=micro_batches,
                key_value_groups=module.num_key_value_groups if is_attention else None,
            )
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for name in (*holder.columns, holder.row):
                linear = getattr(module, name)
                self._linears.append((holder, name, linear))
                linear.site, linear.unit = site, holder.unit
                if name == holder.row:
                    linear.__class__ = SATRowLinear
                else:
                    linear.whole = site.is_grouped_query and name != "q_proj"
                    linear.__class__ = SATColumnLinear

    def detach(self) -> None:
        """Undo `attach`. Collective where there are several ranks."""
        for hook in self._hooks:
            hook.remove()
        for _, _, linear in self._linears:
            linear.__class__ = nn.Linear
            for name in ("site", "unit", "whole"):
                linear.__dict__.pop(name, None)
        for holder in self._holders:
            if holder.site.module == "attention":
                holder.module.num_key_value_groups = holder.site.units // holder.site.query_groups
        self.group.close()

    def check_intact(self) -> None:
        """TypeError, naming the module, if another library replaced what SAT stands on."""
        for holder in self._holders:
            check_forward(holder.name, holder.module)
        for holder, name, linear in self._linears:
            found = getattr(holder.module, name)
            if found is not linear:
                raise TypeError(
                    f"{holder.name}.{name} has been replaced by a {type(found).__module__}."
                    f"{type(found).__qualname__} since enable_sat"
                )
            check_forward(f"{holder.name}.{name}", linear)


def _check_fit(state: SATState) -> None:
    """ValueError if nothing would be left out; a warning if only heads, or only channels, are."""
    config = state.require_config()
    if config.omission_rate == 0:
        return
    for site in state.sites.values():
        channels = site.units // site.groups
        if site.module == "mlp" and channels < config.channel_multiple:
            raise ValueError(
                f"channel_multiple={config.channel_multiple} is more than the {channels} channels "
                f"of {'each selection group' if site.groups > 1 else 'an MLP'}, which would stay "
                f'dense; use at most {channels}, or modules=("attention",)'
            )
    kept = state.kept_units(config.omission_rate)
    dense = [module for module in config.modules if kept[module] is None]
    if not dense:
        return
    units = {site.module: site.units for site in state.sites.values()}
    what = " and ".join(f"the {units[module]} units of each {module}" for module in dense)
    message = f"at omission_rate={config.omission_rate} rounding keeps {what}"
    if len(dense) == len(config.modules):
        raise ValueError(
            f"{message}, so that nothing is left out; use a higher rate, or a channel_multiple "
            f"below {config.channel_multiple}"
        )
    logger.warning("%s: nothing is left out there", message)

"""Which models can be trained, and what of theirs is sliced."""

from typing import Any, NamedTuple

from torch import nn
from torch.distributed.tensor import DTensor

# The base model's class, as its module and name, and the beginning of its layers' class names.
# By name, so that none of these modules is imported for a model of another family.
FAMILIES = {
    f"transformers.models.{family.lower()}.modeling_{family.lower()}": family
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
SUPPORTED = "Llama, Mistral, Qwen2 (and Qwen2.5) and Qwen3 models of transformers"

ATTENTION_COLUMNS = ("q_proj", "k_proj", "v_proj")
MLP_COLUMNS = ("gate_proj", "up_proj")
ATTENTION_ROW = "o_proj"
MLP_ROW = "down_proj"


class Layer(NamedTuple):
    """One decoder layer: its number, counted from 1, and the modules that hold its sites."""

    number: int
    attention: Any
    mlp: Any


def find_base_model(model: nn.Module) -> Any:
    """The base model, such as ``LlamaModel``, of a model of one of the families.

    TypeError, naming the class, for any other model.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    name = type(model).__name__
    if _is_peft(model) or _is_peft(getattr(model, "base_model", model)):
        raise TypeError(f"{name}: {_PEFT}")
    base = getattr(model, "base_model", model)
    if _family(base) is None:
        raise TypeError(f"{name} is not supported by SAT; valid: {SUPPORTED}")
    return base


def check_layers(base: Any) -> list[Layer]:
    """The decoder layers of ``base``.

    TypeError, naming the module, unless all of them are transformers' own, with plain linears.
    """
    family = _family(base)
    modeling = f"transformers.models.{family}.modeling_{family}".lower()
    layers = []
    for index, layer in enumerate(base.layers):
        attention, mlp = layer.self_attn, layer.mlp
        _check_module(f"layers.{index}.self_attn", attention, modeling, f"{family}Attention")
        _check_module(f"layers.{index}.mlp", mlp, modeling, f"{family}MLP")
        for name in (*ATTENTION_COLUMNS, ATTENTION_ROW):
            _check_linear(f"layers.{index}.self_attn.{name}", getattr(attention, name))
        for name in (*MLP_COLUMNS, MLP_ROW):
            _check_linear(f"layers.{index}.mlp.{name}", getattr(mlp, name))
        layers.append(Layer(index + 1, attention, mlp))
    return layers


_PEFT = (
    "PEFT's layers are not supported by SAT: adapters freeze the weights that SAT trains; merge "
    "them (merge_and_unload), or train without SAT"
)


def _family(base: nn.Module) -> str | None:
    """Which family a base model is of, a user's subclass included."""
    for base_class in type(base).__mro__:
        family = FAMILIES.get(base_class.__module__)
        if family is not None and base_class.__qualname__ == f"{family}Model":
            return family
    return None


def _is_peft(module: object) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def _check_module(name: str, module: nn.Module, modeling: str, expected: str) -> None:
    found = type(module)
    if (found.__module__, found.__qualname__) != (modeling, expected):
        raise TypeError(
            f"{name} is a {found.__module__}.{found.__qualname__}, not transformers' own "
            f"{expected}: its computation is not known to SAT"
        )
    check_forward(name, module)


def _check_linear(name: str, linear: nn.Module) -> None:
    found = type(linear)
    if _is_peft(linear):
        raise TypeError(f"{name} is a {found.__qualname__}: {_PEFT}")
    if found is not nn.Linear:
        raise TypeError(
            f"{name} is a {found.__module__}.{found.__qualname__}, not a torch.nn.Linear; SAT "
            "trains unquantised models without replaced layers"
        )
    if isinstance(linear.weight, DTensor):
        raise TypeError(f"{name} is sharded over devices (tp_plan): load the model without it")
    check_forward(name, linear)


def check_forward(name: str, module: nn.Module) -> None:
    """TypeError, naming the module, if its ``forward`` is not its class's own: hooks of
    accelerate's ``device_map`` and Liger replace it on the instance."""
    forward = module.__dict__.get("forward")
    if forward is not None:
        where = getattr(forward, "__module__", None) or type(forward).__module__
        raise TypeError(
            f"the forward of {name} has been replaced by one of {where}: load the model without "
            'device_map, and use Liger with liger_kernel_config={"swiglu": False}'
        )

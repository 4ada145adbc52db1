"""The attention policies that can be compared. A policy joins by one file here that says @register.

A policy is a frozen dataclass whose fields are its parameters, with

    name: str                               (a class variable)
    attend(layer, q, k, v) -> (out, stats)

layer counts from 0; q [tokens, query heads, head_dim], k and v [tokens, KV heads, head_dim], rotated and contiguous, the
model's dtype, softmax scale 1 / sqrt(head_dim); out has q's shape; stats is headwater.eval.attention.Stats. Layers of a
prompt come in order, layer 0 first, so a policy that carries something from layer to layer starts anew there.
"""

import dataclasses
import importlib
import pkgutil
from typing import ClassVar, Mapping, Optional, Protocol, Tuple

import torch

from headwater.eval.attention import Stats


class Policy(Protocol):
    name: ClassVar[str]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tuple[torch.Tensor, Stats]: ...


_registry = {}


def register(policy: type) -> type:
    """Class decorator."""
    if policy.name in _registry:
        raise ValueError(f"policy '{policy.name}' is there twice")
    _registry[policy.name] = policy
    return policy


def names() -> list:
    _load()
    return sorted(_registry)


def of_model() -> dataclasses.Field:
    """A field that make() fills from the model, and no flag does."""
    return dataclasses.field(default=(), metadata={"of_model": True})


def make(spec: str, model: Optional[Mapping[str, object]] = None) -> Policy:
    """A policy of "name" or "name:parameter=value,...". model: values of of_model() fields by name. ValueError names what is
    wrong."""
    _load()
    name, _, rest = spec.partition(":")
    if name not in _registry:
        raise ValueError(f"policy '{name}' is not one of {', '.join(names())}")
    every = dataclasses.fields(_registry[name])
    fields = {field.name: field.type for field in every if not field.metadata.get("of_model")}
    values = {field.name: (model or {})[field.name] for field in every if field.name not in fields and field.name in (model or {})}
    for part in filter(None, rest.split(",")):
        key, equals, text = part.partition("=")
        if key not in fields or not equals:
            raise ValueError(f"policy {name} has no parameter '{part}'; it has {', '.join(fields) or 'none'}")
        try:
            values[key] = fields[key](text)
        except ValueError as error:
            raise ValueError(f"policy {name}: {key} is '{text}'; {fields[key].__name__} is wanted") from error
    return _registry[name](**values)


def check_range(policy: Policy, name: str, least: float, most: float) -> None:
    """For __post_init__: ValueError where the parameter is not from least to most."""
    value = getattr(policy, name)
    if not least <= value <= most:
        raise ValueError(f"policy {policy.name}: {name} is {value}; {least} to {most} is wanted")


def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")

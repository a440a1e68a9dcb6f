"""What a configuration says of single layers, cut to those that are kept.

It may say it in a list as long as the model is deep, in a list of layers' numbers, or by a rule ("the first three are
dense", "every second one has experts"). Lists are cut. A rule is given the values by which it says of the kept layers,
at their new numbers, what it said at the old ones; where there are none, the choice of layers is refused by its name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddk_pipe.pipeline.errors import DdkError

OF_NUMBERS = re.compile(r"layer|idx|indices|indexes")  # names of lists of layers' numbers
NOT_OF_LAYERS = re.compile(r"token|^architectures$|label|limit|range|section")  # as long by chance


@dataclass(frozen=True)
class Rule:
    """A rule by layer number: what `says(number, *values of fields)` of a layer; None for values that may not be."""

    fields: tuple[str, ...]
    says: Callable[..., bool | None]


def _first(number: int, count: int) -> bool:
    return number < count


def _periodic(number: int, period: int, offset: int) -> bool | None:
    return number % period == offset if 0 <= offset < period else None


def _every_between(number: int, first: int, last: int, period: int) -> bool | None:
    return first <= number <= last and (number + 1) % period == 0 if period > 0 else None


RULES = (
    Rule(("first_k_dense_replace",), _first),
    Rule(("num_dense_layers",), _first),
    Rule(("attn_layer_period", "attn_layer_offset"), _periodic),
    Rule(("expert_layer_period", "expert_layer_offset"), _periodic),
    Rule(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), _every_between),
)


def cut_settings(config: Any, keep: list[int], depth: int) -> None:
    """Change a text model's configuration of `depth` layers, in place, into that of the layers `keep`.

    Raises DdkError naming the fields that cannot say what the kept layers are.
    """
    changes = {**_by_lists(config, keep, depth), **_by_rules(config, keep), **_sparse_steps(config, keep)}
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and keep != list(range(len(keep))):
        raise _unsayable(config, keep, ("scale_attn_by_inverse_layer_idx",))
    if isinstance(getattr(config, "attention_types", None), list | tuple):  # GPT-Neo, which derives the list
        changes["attention_types"] = [[[config.attention_layers[number]], 1] for number in keep]
    config.num_hidden_layers = len(keep)
    for name, value in changes.items():
        setattr(config, name, value)


def _by_lists(config: Any, keep: list[int], depth: int) -> dict[str, Any]:
    """Fields that are a list of layers' numbers, or that have an entry for each layer (a letter, of a pattern)."""
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if not isinstance(value, list | tuple) or NOT_OF_LAYERS.search(name):
            if isinstance(value, str) and name.endswith("pattern") and len(value) == depth:
                changes[name] = "".join(value[number] for number in keep)
        elif OF_NUMBERS.search(name) and _are_numbers(value, depth):
            changes[name] = type(value)(new for new, number in enumerate(keep) if number in value)
        elif len(value) == depth:
            changes[name] = type(value)(value[number] for number in keep)
    return changes


def _are_numbers(values: list[Any] | tuple[Any, ...], depth: int) -> bool:
    """True for numbers of layers that rise; flags of each layer do not."""
    numbers = all(type(value) is int and 0 <= value < depth for value in values)
    return numbers and list(values) == sorted(set(values)) and not (len(values) == depth == 2)


def _by_rules(config: Any, keep: list[int]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for rule in RULES:
        found = [getattr(config, field, None) for field in rule.fields]
        values = tuple(value for value in found if type(value) is int)
        if len(values) == len(rule.fields):
            changes |= zip(rule.fields, _values(rule, values, config, keep), strict=True)
    return changes


def _values(rule: Rule, values: tuple[int, ...], config: Any, keep: list[int]) -> tuple[int, ...]:
    """Values by which the rule says of positions what `values` say of the kept layers."""
    wanted = [rule.says(number, *values) for number in keep]
    others = itertools.product(range(len(keep) + 2), repeat=len(values))
    for tried in itertools.chain([values], others):
        if [rule.says(position, *tried) for position in range(len(keep))] == wanted:
            return tried
    raise _unsayable(config, keep, rule.fields)


def _sparse_steps(config: Any, keep: list[int]) -> dict[str, Any]:
    """Qwen's rule: every `decoder_sparse_step`-th layer has experts unless it is in `mlp_only_layers`. A list says it all."""
    step, dense = getattr(config, "decoder_sparse_step", None), getattr(config, "mlp_only_layers", None)
    if type(step) is not int or step < 1 or not isinstance(dense, list | tuple):
        return {}
    without = [new for new, number in enumerate(keep) if number in dense or (number + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": without}


def _unsayable(config: Any, keep: list[int], fields: tuple[str, ...]) -> DdkError:
    return DdkError(
        f"student.keep_layers: {' and '.join(fields)} of the teacher's {type(config).__name__} tell layers apart by"
        f" their number, and have no values that keep layers {keep} as they are",
        hint="keep the first layers, or use student.config or student.model",
    )

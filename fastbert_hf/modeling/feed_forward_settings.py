"""What `config.feed_forward` may say, and the layers that it puts in place of a stock encoder's own."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .families import encoder_layers, get_encoder_family
from .fast_feedforward import LeafTree, NeuronTrees


# By the `form` of a config's `feed_forward`.
FORMS = {"leaves": LeafTree, "neurons": NeuronTrees}
# The largest value of every whole number of such a config; the smallest is 0, of `leaf_size` 1.
LARGEST = {"depth": 20, "leaf_size": 65_536, "master_size": 65_536, "trees": 65_536}
FORM_FIELDS = {
    "leaves": ("depth", "leaf_size", "master_size", "routing", "hardening", "balance", "region_leak"),
    "neurons": ("trees", "depth", "bias"),
}


def check_feed_forward(settings: Any, num_layers: int) -> None:
    """Raise a `ValueError` unless `settings` is what `config.feed_forward` may be: `None`, or a form with fields."""
    if settings is None:
        return
    example = 'feed_forward={"form": "leaves", "depth": 3, "leaf_size": 96, "master_size": 96}'
    form = settings.get("form") if isinstance(settings, Mapping) else None
    if not isinstance(form, str) or form not in FORMS:
        raise ValueError(
            f"feed_forward={settings!r:.80} must be a dict whose form is one of {', '.join(FORMS)}. Example: {example}"
        )
    unknown = sorted(set(settings) - {"form", "layers", *FORM_FIELDS[form]})
    if unknown:
        raise ValueError(
            f"feed_forward has no field {unknown[0]!r:.40} in the form {form!r}, only {', '.join(FORM_FIELDS[form])} "
            f"and layers. Example: {example}"
        )
    for name, value in settings.items():
        if name in LARGEST and (type(value) is not int or not (name == "leaf_size") <= value <= LARGEST[name]):
            raise ValueError(
                f"{name} of feed_forward must be a whole number from {int(name == 'leaf_size')} to {LARGEST[name]:,}, "
                f"got {value!r:.40}."
            )
        if name in ("hardening", "balance", "region_leak") and not (
            type(value) in (int, float) and 0 <= value < (1 if name == "region_leak" else 1e6)
        ):
            raise ValueError(f"{name} of feed_forward must be a number of at least 0, got {value!r:.40}.")
    if settings.get("routing", "hard") not in ("hard", "soft"):
        raise ValueError(f"routing of feed_forward is 'hard' or 'soft', not {settings['routing']!r:.40}.")
    layers = settings.get("layers")
    if layers is not None and not (
        isinstance(layers, (list, tuple))
        and len(set(map(repr, layers))) == len(layers) > 0
        and all(type(number) is int and 1 <= number <= num_layers for number in layers)
    ):
        raise ValueError(
            f"layers of feed_forward must be different numbers from 1 to {num_layers}, got {layers!r:.80}; leave it "
            "out for all layers."
        )


def feed_forward_parameters(settings: Mapping[str, Any], hidden_size: int) -> int:
    """Return about how many parameters each layer of a checked config has in its feed-forward half."""
    defaults = signature(FORMS[settings["form"]]).parameters
    own = {**{name: parameter.default for name, parameter in defaults.items()}, **settings}
    if settings["form"] == "neurons":
        return own["trees"] * 2 ** (own["depth"] + 2) * hidden_size
    return (2 ** own["depth"] * (3 * own["leaf_size"] + 2) + 3 * own["master_size"]) * hidden_size


def make_feed_forward(settings: Mapping[str, Any], hidden_size: int, activation: nn.Module, gated: bool) -> nn.Module:
    """Return a new layer from a config's `feed_forward`."""
    fields = {name: value for name, value in settings.items() if name not in ("form", "layers")}
    if gated and settings["form"] == "neurons":
        raise ValueError(
            "the neurons of this family have gates, which those of UltraFastBERT have not: use "
            'feed_forward={"form": "leaves", ...}.'
        )
    if gated:
        fields["gated"] = True
    return FORMS[settings["form"]](hidden_size, activation, **fields)


def feed_forward_holders(backbone: PreTrainedModel, layers: list[int] | None = None) -> dict[int, list[nn.Module]]:
    """
    Return the modules that hold the feed-forward half of the chosen layers, by the number of the layer, from 1. ALBERT
    repeats its own, which count where they are first.
    """
    parts, seen, holders = get_encoder_family(backbone.config).feed_forward, set(), {}
    modules = list(enumerate(encoder_layers(backbone), start=1))
    chosen = {number for number, _ in modules} if layers is None else set(layers)
    for number, layer in modules:
        if any(layer is other and (number in chosen) != (place in chosen) for place, other in modules):
            raise ValueError(
                f"layers={sorted(chosen)} of feed_forward leaves out layers that share their weights with others of "
                "them: leave out layers."
            )
        if number in chosen and id(layer) not in seen:
            seen.add(id(layer))
            holders[number] = list(parts.holders(layer))
    return holders


def replace_feed_forward(backbone: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Put new layers, as a config's `feed_forward` describes them, in place of a stock encoder's own."""
    parts = get_encoder_family(backbone.config).feed_forward
    for holders in feed_forward_holders(backbone, settings.get("layers")).values():
        for holder in holders:
            put_feed_forward(
                holder,
                parts.place,
                parts.passed,
                make_feed_forward(
                    settings, backbone.config.hidden_size, holder.get_submodule(parts.activation), parts.gated
                ),
            )


def put_feed_forward(holder: nn.Module, place: str, passed: tuple[str, ...], feed_forward: nn.Module) -> None:
    """Put one layer in its place."""
    for name in passed:
        holder.set_submodule(name, nn.Identity())
    holder.set_submodule(place, feed_forward)


def feed_forward_layers(backbone: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the fast feed-forward layers of an encoder by their names."""
    return {name: module for name, module in backbone.named_modules() if isinstance(module, tuple(FORMS.values()))}

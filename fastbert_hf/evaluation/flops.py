"""
What an answer costs, counted in two ways: as the FastBERT paper counts, and as the packed forward really computes.

Both count a multiply-accumulate as 2 floating-point operations and leave out what is not a matrix product (norms,
activations, softmax). Neither is a time: time is measured ([`time_speeds`]).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers import PreTrainedModel

from ..modeling.families import FeedForwardParts, get_encoder_family
from ..modeling.token_coarsening import Coarsening


if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _onednn_linear_flops(tokens_shape, weight_shape, *args, **kwargs) -> int:
        """Count oneDNN's linear layers, which the engine may choose, as FlopCounterMode counts any other."""
        return 2 * math.prod(tokens_shape) * weight_shape[0]


if hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.ops.onednn.qlinear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.onednn.qlinear_pointwise)
    def _int8_linear_flops(tokens_shape, x_scale, x_zero_point, weight_shape, scale_shape, *args, **kwargs) -> int:
        """Count the products of int8 layers as those of any other."""
        return 2 * math.prod(tokens_shape) * scale_shape[0]


def paper_flops(
    model: PreTrainedModel,
    exit_layer: torch.Tensor,
    students: bool = True,
    sequence_length: int = 128,
    min_exit_layer: int = 1,
) -> torch.Tensor:
    """
    Count as FastBERT does (ACL 2020, Tables 2 and 3): the linear layers alone, every text padded to one length,
    without the attention products and the last Linear of an exit. An exit's 128 x 128 layer counts once, as the
    authors' code runs it; the paper's Table 1 counts it for every token.

    For BERT-base it gives the paper's numbers: 21,785,247,744 for all layers and the teacher, 11,123,490,816 for a
    text that leaves after six layers, 3,707,830,272 after two (Table 3).

    Args:
        model ([`FastBertForSequenceClassification`]): Its shape counts, not its weights: it may be on `meta`.
        exit_layer (`torch.Tensor` of any shape, long): Layers that each text ran through, 1 to L.
        students (`bool`):
            Whether the exits on the way were evaluated, as they are at any speed above 0. Without them only the exit
            that answers is counted, as at speed 0 and with `max_layers` alone.
        sequence_length (`int`): Tokens of every padded text.
        min_exit_layer (`int`): The first layer whose exit was evaluated.

    Returns:
        `torch.Tensor`: long, shaped as `exit_layer`, on the CPU.
    """
    layers, exits = paper_costs(model, sequence_length)
    return _up_to_exit(layers, exits, exit_layer.cpu(), students, min_exit_layer)


def executed_flops(
    model: PreTrainedModel,
    exit_layer: torch.Tensor,
    lengths: torch.Tensor,
    students: bool = True,
    min_exit_layer: int = 1,
) -> torch.Tensor:
    """
    Count the matrix products that the adaptive forward really computes for each text: its own tokens only, attention
    products and the exits on the way included. Agrees with `torch.utils.flop_counter.FlopCounterMode`.

    Args:
        model ([`FastBertForSequenceClassification`]): Its shape counts, not its weights.
        exit_layer (`torch.Tensor` of shape `[rows]`, long): Layers that each text ran through, 1 to L.
        lengths (`torch.Tensor` of shape `[rows]`, long): Tokens of each text.
        students (`bool`): As in [`paper_flops`].
        min_exit_layer (`int`): As in [`paper_flops`].

    Returns:
        `torch.Tensor`: long of shape `[rows]`, on the CPU.
    """
    layers, exits = executed_costs(model, lengths)
    return _up_to_exit(layers, exits, exit_layer.cpu(), students, min_exit_layer)


def paper_costs(model: PreTrainedModel, sequence_length: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return what each layer and each exit costs in the count of [`paper_flops`].

    Args:
        model ([`FastBertForSequenceClassification`]): Its shape counts.
        sequence_length (`int`): Tokens of every padded text.

    Returns:
        `tuple` of two `torch.Tensor`: long of shape `[L]` each.
    """
    layers = [sequence_length * _linear_weights(layer) for layer in model.fastbert.layers()]
    exits = []
    for exit_classifier in model.exits:
        pooler = _pooler(model, exit_classifier)
        once = 0 if pooler.layout.per_token else _linear_weights(pooler.exit_dense)
        exits.append(sequence_length * (_linear_weights(pooler) - once) + once)
    return 2 * torch.tensor(layers), 2 * torch.tensor(exits)


def executed_costs(
    model: PreTrainedModel, lengths: torch.Tensor, retention: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return what each layer and each exit costs in the count of [`executed_flops`]; the embeddings count in the first
    layer.

    Args:
        model ([`FastBertForSequenceClassification`]): Its shape counts.
        lengths (`torch.Tensor` of shape `[rows]`, long): Tokens of each text.
        retention (`float`, *optional*): As in the model's `forward`.

    Returns:
        `tuple` of two `torch.Tensor`: long of shape `[rows, L]` each, on the CPU.
    """
    text_lengths, coarsening = lengths.cpu().long(), Coarsening.of(model.config.coarsening, retention)
    parts, tokens, layers, exits = get_encoder_family(model.config.text_config).feed_forward, text_lengths, [], []
    for depth, (layer, exit_classifier) in enumerate(zip(model.fastbert.layers(), model.exits, strict=True), start=1):
        units = tokens if coarsening is None else coarsening.units(depth, text_lengths, tokens)
        layers.append(_layer_macs(layer, parts, tokens, units, model.config.hidden_size))
        if coarsening is not None and coarsening.merge != "drop":  # shares of every merged token in every coarse one
            layers[-1] += ((tokens - units + coarsening.clusters) * coarsening.clusters * model.config.hidden_size) * (
                units < tokens
            )
        tokens = units
        pooler = _pooler(model, exit_classifier)
        answers = tokens if pooler.layout.per_token else 1
        exits.append(pooler.macs(tokens) + answers * _linear_weights(exit_classifier.out_proj))
    layers[0] = layers[0] + text_lengths * _embedding_weights(model)
    return 2 * torch.stack(layers, 1), 2 * torch.stack(exits, 1)


def _up_to_exit(
    layers: torch.Tensor, exits: torch.Tensor, exit_layer: torch.Tensor, students: bool, min_exit_layer: int
) -> torch.Tensor:
    """Add up the costs of the layers and exits, `[..., L]`, that a text meets on its way to its exit layer."""
    num_layers = layers.shape[-1]
    if ((exit_layer < 1) | (exit_layer > num_layers)).any():
        raise ValueError(f"exit_layer must be from 1 to {num_layers}, got {exit_layer.unique().tolist()}.")
    depth = torch.arange(1, num_layers + 1)
    is_run = depth <= exit_layer[..., None]
    is_evaluated = is_run & (depth >= min_exit_layer) if students else depth == exit_layer[..., None]
    return (layers * is_run + exits * is_evaluated).sum(-1)


def _layer_macs(
    layer: nn.Module, parts: FeedForwardParts, tokens: torch.Tensor, units: torch.Tensor, hidden_size: int
) -> torch.Tensor:
    """Return the multiply-accumulates of one layer, `[rows]`, whose feed-forward half reads `units` of the tokens."""
    *_, holder = parts.holders(layer)  # before the last one, ALBERT may have whole layers, of all tokens
    named = dict.fromkeys((parts.place, *parts.passed, parts.up, parts.down))
    outermost = [name for name in named if not any(name.startswith(f"{other}.") for other in named)]
    feed_forward = sum(_linear_weights(holder.get_submodule(name)) for name in outermost)
    # Scores and their weighted sum: two products of every token with every other, over the whole hidden size.
    attention = tokens * (_linear_weights(layer) - feed_forward) + 2 * tokens**2 * hidden_size
    return attention + units * feed_forward


def _embedding_weights(model: PreTrainedModel) -> int:
    """Return the weights that a token meets before the first layer: a projection to the hidden width, if any."""
    backbone = model.fastbert.backbone
    projection = get_encoder_family(backbone.config).projection
    if projection is None or not hasattr(backbone, projection.partition(".")[0]):
        return 0
    return _linear_weights(backbone.get_submodule(projection))


def _pooler(model: PreTrainedModel, exit_classifier: nn.Module) -> nn.Module:
    return model.shared_pooler if exit_classifier.pooler is None else exit_classifier.pooler


def _linear_weights(module: nn.Module) -> int:
    """Return the multiply-accumulates of all linear layers of a module for one token: their weights."""
    # What PEFT saves with an adapter, it keeps as a copy beside the original, and runs one of the two.
    linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    of_linears = sum(part.weight.numel() for name, part in linear.items() if "modules_to_save" not in name.split("."))
    # Of a fast feed-forward layer only what a token meets.
    return of_linears + sum(getattr(part, "macs_per_token", 0) for part in module.modules())

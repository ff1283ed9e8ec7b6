"""
What an answer costs, counted in two ways: as the FastBERT paper counts, and as the packed forward really computes.

Both count a multiply-accumulate as 2 floating-point operations and leave out what is not a matrix product (norms,
activations, softmax). Neither is a time: time is measured ([`time_speeds`]).
"""

from __future__ import annotations

import torch
from torch import nn

from ..modeling.encoder_layouts import get_encoder_layout
from ..modeling.modeling_fastbert import FastBertForSequenceClassification


def paper_flops(
    model: FastBertForSequenceClassification,
    exit_layer: torch.Tensor,
    students: bool = True,
    sequence_length: int = 128,
    min_exit_layer: int = 1,
) -> torch.Tensor:
    """
    The count of FastBERT (ACL 2020, Tables 2 and 3): the linear layers alone, every text padded to one length, without
    the attention products and the last Linear of an exit. An exit's 128 x 128 layer counts once, as the authors' code
    runs it; the paper's Table 1 counts it for every token.

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
    exit_layer = exit_layer.cpu()
    layers = [sequence_length * 2 * linear_weights(layer) for layer in model.fastbert.layers()]
    exits = [_paper_exit_flops(model, exit_classifier, sequence_length) for exit_classifier in model.exits]
    per_text = torch.tensor(layers).cumsum(0) + _exits_up_to(torch.tensor(exits), students, min_exit_layer)
    return _at(per_text.expand(*exit_layer.shape, -1), exit_layer)


def executed_flops(
    model: FastBertForSequenceClassification,
    exit_layer: torch.Tensor,
    lengths: torch.Tensor,
    students: bool = True,
    min_exit_layer: int = 1,
) -> torch.Tensor:
    """
    The matrix products that the adaptive forward really computes for each text: its own tokens only, attention
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
    exit_layer, tokens = exit_layer.cpu(), lengths.cpu()[:, None].long()  # [rows, 1]
    weights = torch.tensor([linear_weights(layer) for layer in model.fastbert.layers()])
    # Scores and their weighted sum: two products of every token with every other, over the whole hidden size.
    layers = 2 * tokens * weights + 4 * tokens**2 * model.config.hidden_size  # [rows, L]
    exits = torch.cat([_executed_exit_flops(model, exit_classifier, tokens) for exit_classifier in model.exits], 1)
    embeddings = 2 * tokens * _embedding_products(model)
    return _at(embeddings + layers.cumsum(1) + _exits_up_to(exits, students, min_exit_layer), exit_layer)


def linear_weights(module: nn.Module) -> int:
    """Multiply-accumulates of all linear layers of a module for one token: the number of their weights."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _exits_up_to(exits: torch.Tensor, students: bool, min_exit_layer: int) -> torch.Tensor:
    if not students:
        return exits
    is_evaluated = torch.arange(1, exits.shape[-1] + 1) >= min_exit_layer
    return (exits * is_evaluated).cumsum(-1)


def _at(flops: torch.Tensor, exit_layer: torch.Tensor) -> torch.Tensor:
    if ((exit_layer < 1) | (exit_layer > flops.shape[-1])).any():
        raise ValueError(f"exit_layer must be from 1 to {flops.shape[-1]}, got {exit_layer.unique().tolist()}.")
    return flops.gather(-1, (exit_layer - 1)[..., None])[..., 0]


def _pooler(model: FastBertForSequenceClassification, exit_classifier: nn.Module) -> nn.Module:
    return model.shared_pooler if exit_classifier.pooler is None else exit_classifier.pooler


def _paper_exit_flops(
    model: FastBertForSequenceClassification, exit_classifier: nn.Module, sequence_length: int
) -> int:
    pooler = _pooler(model, exit_classifier)
    once = linear_weights(pooler.exit_dense)
    return 2 * (sequence_length * (linear_weights(pooler) - once) + once)


def _executed_exit_flops(
    model: FastBertForSequenceClassification, exit_classifier: nn.Module, tokens: torch.Tensor
) -> torch.Tensor:
    pooler = _pooler(model, exit_classifier)
    once = linear_weights(pooler) + linear_weights(exit_classifier.out_proj)
    every_token = 0
    if hasattr(pooler, "exit_key"):
        every_token = sum(map(linear_weights, (pooler.exit_projection, pooler.exit_key, pooler.exit_value)))
        once -= every_token
        # Only the first token asks: one row of scores and one weighted sum, over the width of the exit.
        every_token += 2 * pooler.exit_key.out_features
    return 2 * (tokens * every_token + once)


def _embedding_products(model: FastBertForSequenceClassification) -> int:
    """Multiply-accumulates for one token before the first layer: a projection to the hidden width, if there is one."""
    backbone = model.fastbert.backbone
    layout = get_encoder_layout(backbone.config)
    if layout.projection is not None and hasattr(backbone, layout.projection.partition(".")[0]):
        return linear_weights(backbone.get_submodule(layout.projection))
    return 0

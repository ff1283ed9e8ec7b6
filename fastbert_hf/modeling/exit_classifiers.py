"""The exits: what reads the packed hidden states of one layer and answers for every text."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .answer_layouts import TextLayout, TokenLayout
from .families import get_encoder_family
from .packed_attention import attend_within_texts
from .packed_batch import PackedBatch


@singledispatch
def take_up_query(key_layer: nn.Module, query: torch.Tensor) -> torch.Tensor:
    r"""
    Return what gives attention scores in a product with what keys are made of: \\( W_k^T q \\) of each head, `[texts,
    heads, in_features]`. What stands for a key layer in a graph registers its own way.

    Args:
        key_layer (`nn.Linear`, or what takes its place, such as a layer with adapters).
        query (`torch.Tensor` of shape `[texts, heads, head_dim]`).
    """
    is_plain = type(key_layer) is nn.Linear and type(key_layer.weight) in (nn.Parameter, torch.Tensor)
    has_hooks = key_layer._forward_pre_hooks or key_layer._forward_hooks or "forward" in vars(key_layer)
    if is_plain and not has_hooks and not torch.is_grad_enabled():
        weight = key_layer.weight
    else:  # with adapters, few bits, weights that come with the call, or to be learnt: they are what it makes of ones
        ones = torch.eye(key_layer.in_features, dtype=query.dtype, device=query.device)
        weight = (key_layer(ones) - key_layer(torch.zeros_like(ones[:1]))).T
    return (query.transpose(0, 1) @ weight.unflatten(0, query.shape[1:])).transpose(0, 1)


class ExitPooler(nn.Module):
    """What an exit has below its last Linear."""

    layout = TextLayout()  # whether it reads a vector for each text or for each token

    @staticmethod
    def sizes(hidden_size: int, exit_hidden_size: int) -> tuple[int, int]:
        """Return the size of a vector, and the number of weights."""
        raise NotImplementedError

    def macs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the multiply-accumulates of all matrix products for texts of so many tokens, shaped as `tokens`."""
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        """Return the vectors, `[texts, size]` or `[total_tokens, size]`, of `[1, total_tokens, hidden_size]`."""
        raise NotImplementedError


class AttentionExitPooler(ExitPooler):
    r"""
    The body of the paper's exit classifier (FastBERT, ACL 2020, section 3.1.3 and its Table 1): project to a small
    width, one self-attention without residual or norm, first token, one dense layer.

    Only the first token is read, so only its query is computed. Keys and values are not formed for each token, as in
    every head \\( q^T (W_k x + b_k) = (W_k^T q)^T x + c \\), where c changes no attention probability, and
    \\( \sum_t p_t (W_v x_t + b_v) = W_v \sum_t p_t x_t + b_v \\): the matrices meet each text once.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        size = config.exit_hidden_size
        self.num_heads = config.exit_num_attention_heads
        self.dropout = config.exit_dropout
        self.exit_projection = nn.Linear(config.hidden_size, size)
        self.exit_query = nn.Linear(size, size)
        self.exit_key = nn.Linear(size, size)
        self.exit_value = nn.Linear(size, size)
        self.exit_output = nn.Linear(size, size)
        self.exit_dense = nn.Linear(size, size)

    @staticmethod
    def sizes(hidden_size: int, exit_hidden_size: int) -> tuple[int, int]:
        return exit_hidden_size, (hidden_size + 5 * exit_hidden_size) * exit_hidden_size

    def macs(self, tokens: torch.Tensor) -> torch.Tensor:
        size = self.exit_dense.out_features
        # Of every token its projection, its score and its share of the weighted sum in each head; the rest once.
        every_token = self.exit_projection.in_features * size + 2 * self.num_heads * size
        return tokens * every_token + (4 + self.num_heads) * size**2

    def forward(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        states = self.exit_projection(hidden_states).tanh()  # [1, total_tokens, size]
        heads = (self.num_heads, -1)
        query = self.exit_query(states[0, packed_batch.first_tokens]).unflatten(-1, heads)
        attended = attend_within_texts(
            packed_batch,
            take_up_query(self.exit_key, query).flatten(0, 1)[None, None],  # [1, 1, texts * heads, size]
            states[None],
            states[None],
            scaling=query.shape[-1] ** -0.5,
            dropout=self.dropout if self.training else 0.0,
            queries_per_text=self.num_heads,
        )
        # Each head has a weighted sum of its own, and takes its part of the values of that.
        values = self.exit_value(attended.view(-1, self.num_heads, states.shape[-1])).unflatten(-1, heads)
        values = values.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)  # [texts, size]
        return self.exit_dense(self.exit_output(values)).tanh()


class LinearExitPooler(ExitPooler):
    """Dense, activation and dropout on the first token, as in the stock classifiers and in DeeBERT and PABEE."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.exit_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[get_encoder_family(config.text_config).head_activation]
        self.dropout = nn.Dropout(config.exit_dropout)

    @staticmethod
    def sizes(hidden_size: int, exit_hidden_size: int) -> tuple[int, int]:
        return hidden_size, hidden_size**2

    def macs(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tokens, self.exit_dense.weight.numel())

    def read(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        """Return one vector for each text, `[texts, hidden_size]`, out of `[1, total_tokens, hidden_size]`."""
        return hidden_states[0, packed_batch.first_tokens]

    def forward(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        return self.dropout(self.activation(self.exit_dense(self.read(hidden_states, packed_batch))))


class MeanExitPooler(LinearExitPooler):
    """The same on the mean of the text's tokens, for backbones whose lower layers put little into the first one."""

    def read(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        return packed_batch.mean_of_texts(hidden_states)


class TokenExitPooler(ExitPooler):
    """Dropout on every token: with the last Linear, the head of the stock token classifiers."""

    layout = TokenLayout()

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.exit_dropout)

    @staticmethod
    def sizes(hidden_size: int, exit_hidden_size: int) -> tuple[int, int]:
        return hidden_size, 0

    def macs(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tokens)

    def forward(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        return self.dropout(hidden_states[0])


class DenseTokenExitPooler(ExitPooler):
    """A dense layer of `exit_hidden_size` on every token, so that a student can make more of a lower layer."""

    layout = TokenLayout()

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.exit_dense = nn.Linear(config.hidden_size, config.exit_hidden_size)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(config.exit_dropout)

    @staticmethod
    def sizes(hidden_size: int, exit_hidden_size: int) -> tuple[int, int]:
        return exit_hidden_size, hidden_size * exit_hidden_size

    def macs(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens * self.exit_dense.weight.numel()

    def forward(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        return self.dropout(self.activation(self.exit_dense(hidden_states[0])))


# What `exit_type` can be: how the hidden states of a text become one vector, or one for each token. The first of each
# is that of a new model. No other code knows which there are.
EXIT_TYPES: dict[str, type[ExitPooler]] = {
    "attention": AttentionExitPooler,
    "linear": LinearExitPooler,
    "linear_mean": MeanExitPooler,
    "token_dense": DenseTokenExitPooler,
    "token_linear": TokenExitPooler,
}


def exit_types_of(layout: TextLayout) -> list[str]:
    """Return the exit types that answer for each text, or for each token."""
    return [name for name, pooler in EXIT_TYPES.items() if pooler.layout.per_token == layout.per_token]


class ExitClassifier(nn.Module):
    """One exit: a pooler, which is a key of `EXIT_TYPES` or one that the exits share, and a Linear to the labels."""

    def __init__(self, config: PreTrainedConfig, exit_type: str, shared_pooler: bool = False):
        super().__init__()
        self.pooler = None if shared_pooler else EXIT_TYPES[exit_type](config)
        features, _ = EXIT_TYPES[exit_type].sizes(config.hidden_size, config.exit_hidden_size)
        self.out_proj = nn.Linear(features, config.num_labels)
        self.layout = EXIT_TYPES[exit_type].layout

    def forward(
        self, hidden_states: torch.Tensor, packed_batch: PackedBatch, shared_pooler: nn.Module | None = None
    ) -> torch.Tensor:
        """
        Return what the exit says of each text, `[texts, num_labels]`, or of each of its tokens, `[texts, tokens,
        num_labels]`, of `[1, total_tokens, hidden_size]`.
        """
        pooler = shared_pooler if self.pooler is None else self.pooler
        return self.layout.arrange(self.out_proj(pooler(hidden_states, packed_batch)), packed_batch)


def build_exits(config: PreTrainedConfig) -> tuple[nn.ModuleList, nn.Module | None]:
    """Return the exits of a config, first to last, and the pooler that those of the students' type share, if any."""
    exit_types = [config.exit_type] * (config.num_hidden_layers - 1) + [config.teacher_exit_type]
    shared_pooler = EXIT_TYPES[config.exit_type](config) if config.share_exit_pooler else None
    exits = nn.ModuleList(
        ExitClassifier(config, exit_type, config.share_exit_pooler and exit_type == config.exit_type)
        for exit_type in exit_types
    )
    return exits, shared_pooler

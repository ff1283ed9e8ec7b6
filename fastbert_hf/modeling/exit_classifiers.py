"""The exits: what reads the packed hidden states of one layer and answers for every text."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .families import get_encoder_family
from .packed_attention import attend_within_texts
from .packed_batch import PackedBatch


class AttentionExitPooler(nn.Module):
    """
    The body of the paper's exit classifier (FastBERT, ACL 2020, section 3.1.3 and its Table 1): project to a small
    width, one self-attention without residual or norm, first token, one dense layer. As only the first token is read,
    only its query is computed.
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
        """Return the size of a text's vector, and the number of weights."""
        return exit_hidden_size, (hidden_size + 5 * exit_hidden_size) * exit_hidden_size

    def macs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the multiply-accumulates of all matrix products for texts of so many tokens, shaped as `tokens`."""
        size = self.exit_dense.out_features
        # Projection, key and value of every token, its score and its share of the weighted sum; the rest once.
        every_token = self.exit_projection.in_features * size + 2 * size**2 + 2 * size
        return tokens * every_token + 3 * size**2

    def forward(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        hidden_states = self.exit_projection(hidden_states).tanh()  # [1, total_tokens, size]
        first_tokens = hidden_states[:, packed_batch.first_tokens]  # [1, texts, size]
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [1, heads, tokens, head_dim]
            for states in (self.exit_query(first_tokens), self.exit_key(hidden_states), self.exit_value(hidden_states))
        )
        dropout = self.dropout if self.training else 0.0
        attended = attend_within_texts(packed_batch, query, key, value, dropout=dropout, first_token_only=True)
        attended = self.exit_output(attended[0].flatten(1))  # [texts, size]
        return self.exit_dense(attended).tanh()


class LinearExitPooler(nn.Module):
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


# What `exit_type` can be: how the hidden states of a text become one vector. No other code knows which there are.
EXIT_TYPES: dict[str, type[nn.Module]] = {
    "attention": AttentionExitPooler,
    "linear": LinearExitPooler,
    "linear_mean": MeanExitPooler,
}


class ExitClassifier(nn.Module):
    """One exit: a pooler, which is a key of `EXIT_TYPES` or one that the exits share, and a Linear to the labels."""

    def __init__(self, config: PreTrainedConfig, exit_type: str, shared_pooler: bool = False):
        super().__init__()
        self.pooler = None if shared_pooler else EXIT_TYPES[exit_type](config)
        features, _ = EXIT_TYPES[exit_type].sizes(config.hidden_size, config.exit_hidden_size)
        self.out_proj = nn.Linear(features, config.num_labels)

    def forward(
        self, hidden_states: torch.Tensor, packed_batch: PackedBatch, shared_pooler: nn.Module | None = None
    ) -> torch.Tensor:
        """Return what the exit says of each text, `[texts, num_labels]`, of `[1, total_tokens, hidden_size]`."""
        pooler = shared_pooler if self.pooler is None else self.pooler
        return self.out_proj(pooler(hidden_states, packed_batch))


def build_exits(config: PreTrainedConfig) -> tuple[nn.ModuleList, nn.Module | None]:
    """Return the exits of a config, first to last, and the pooler that those of the students' type share, if any."""
    exit_types = [config.exit_type] * (config.num_hidden_layers - 1) + [config.teacher_exit_type]
    shared_pooler = EXIT_TYPES[config.exit_type](config) if config.share_exit_pooler else None
    exits = nn.ModuleList(
        ExitClassifier(config, exit_type, config.share_exit_pooler and exit_type == config.exit_type)
        for exit_type in exit_types
    )
    return exits, shared_pooler

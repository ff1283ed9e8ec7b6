"""The exits: what reads the packed hidden states of one layer and names a label for every text."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .encoder_layouts import get_encoder_layout
from .packed_batch import PackedBatch, attend_within_texts


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
        self.activation = ACT2FN[get_encoder_layout(config.text_config).head_activation]
        self.dropout = nn.Dropout(config.exit_dropout)

    def read(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        """`[1, total_tokens, hidden_size]` to one vector a text, `[texts, hidden_size]`."""
        return hidden_states[0, packed_batch.first_tokens]

    def forward(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        return self.dropout(self.activation(self.exit_dense(self.read(hidden_states, packed_batch))))


class MeanExitPooler(LinearExitPooler):
    """The same on the mean of the text's tokens, for backbones whose lower layers put little into the first one."""

    def read(self, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
        groups = hidden_states[0].split([texts * length for texts, length in packed_batch.groups])
        means = [
            tokens.unflatten(0, (texts, -1)).mean(1)
            for tokens, (texts, _) in zip(groups, packed_batch.groups, strict=True)
        ]
        return torch.cat(means)


EXIT_POOLERS = {"attention": AttentionExitPooler, "linear": LinearExitPooler, "linear_mean": MeanExitPooler}


class ExitClassifier(nn.Module):
    """
    One exit: a pooler and a Linear to the labels.

    Args:
        config (`FastBertConfig`): The model's config.
        exit_type (`str`): A key of `EXIT_POOLERS`.
        shared_pooler (`bool`): Whether the caller brings the pooler that the exits share.
    """

    def __init__(self, config: PreTrainedConfig, exit_type: str, shared_pooler: bool = False):
        super().__init__()
        self.pooler = None if shared_pooler else EXIT_POOLERS[exit_type](config)
        features = config.exit_hidden_size if exit_type == "attention" else config.hidden_size
        self.out_proj = nn.Linear(features, config.num_labels)

    def forward(
        self, hidden_states: torch.Tensor, packed_batch: PackedBatch, shared_pooler: nn.Module | None = None
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `[1, total_tokens, hidden_size]`): Of the layer below.
            packed_batch (`PackedBatch`): Where the texts are.
            shared_pooler (`nn.Module`, *optional*): The pooler that the exits share.

        Returns:
            `torch.Tensor` of shape `[texts, num_labels]`.
        """
        pooler = shared_pooler if self.pooler is None else self.pooler
        return self.out_proj(pooler(hidden_states, packed_batch))

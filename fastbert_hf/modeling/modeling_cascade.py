"""CascadeForSequenceClassification: complete classifiers, smallest first, each asked what the one before left open."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import can_return_tuple

from .compiled_layers import CompilesLayers, untraced_forward
from .configuration_cascade import CASCADE_POLICIES, CascadeConfig
from .configuration_fastbert import FastBertConfig
from .dials import speed_of_call
from .encoded_texts import check_on_error, checked_speeds, read_texts
from .engine import TorchEngine
from .exit_policies import ExitPolicy, config_thresholds, exit_range, row_speeds
from .int8_layers import has_int8_layers
from .modeling_fastbert import FastBertForSequenceClassification
from .modeling_outputs import FastBertSequenceClassifierOutput, Prediction
from .packed_batch import PackedBatch
from .pretrained_fastbert import FastBertPreTrainedModel, is_quantised_config
from .processing_cascade import CascadeProcessor, warn_of_other_tokenizer
from .scheduler import Member, answer_rows, answer_texts
from .stock_checkpoints import LOADING_ARGUMENTS, dtype_of
from .token_coarsening import check_retention


class CascadeForSequenceClassification(CompilesLayers, FastBertPreTrainedModel):
    """
    A cascade of complete classifiers (CascadeBERT, Li et al., Findings of EMNLP 2021, Algorithm 1): the smallest
    member answers first, and only texts of which it is not sure go on to the next. A member never runs on a text that
    an earlier one answered. `speed` is the uncertainty below which a member, or an exit inside it, may answer.

    Args:
        config ([`CascadeConfig`]): The cascade's config.

    Example:

    ```python
    >>> from fastbert_hf import CascadeForSequenceClassification
    >>> from transformers import pipeline

    >>> cascade = CascadeForSequenceClassification.from_members(["org/small-classifier", "org/large-classifier"])
    >>> classifier = pipeline("fast-text-classification", model=cascade)
    >>> classifier("I would go there again.", speed=0.3)
    [{'label': 'positive', 'score': 0.98, 'exit_layer': 2, 'exit_member': 1}]
    ```
    """

    config_class = CascadeConfig
    base_model_prefix = "cascade"
    supports_gradient_checkpointing = False
    # The tokenizers that `from_members` has found or was given. They are saved with the cascade.
    processor: CascadeProcessor | None = None

    def __init__(self, config: CascadeConfig):
        super().__init__(config)
        if not config.members:
            raise ValueError(
                "the config names no members. Example: CascadeConfig(members=[small.config, large.config])"
            )
        config.check_members()
        for member in config.members:
            member._attn_implementation = config._attn_implementation
        self.num_labels = config.num_labels
        self.members = nn.ModuleList(FastBertForSequenceClassification(member) for member in config.members)
        self.post_init()

    @classmethod
    def from_members(
        cls,
        members: Sequence[str | os.PathLike | PreTrainedModel],
        tokenizers: Sequence[PreTrainedTokenizerBase | None] | None = None,
        exit_policy: str = "confidence",
        speed: float = 0.5,
        **kwargs,
    ) -> CascadeForSequenceClassification:
        """
        Put two or more classifiers of the same labels one behind the other, cheapest first.

        Args:
            members (sequence of `str`, `PathLike` or `PreTrainedModel`):
                Stock classifiers of supported families, which answer at their last layer, or FastBERT models, in which
                a text can also leave early. Of loaded models copies are made.
            tokenizers (sequence, *optional*):
                One for each member, as [`CascadeProcessor.from_members`] takes them. They are kept as `processor` and
                saved with the cascade; whether they differ goes into the config as `own_tokenizers`.
            exit_policy (`str`): As in [`CascadeConfig`].
            speed (`float`): The speed that the pipeline uses when the call names none.
            kwargs: Arguments of `from_pretrained` (`revision`, `token`, `dtype`, ...), for every member.

        Returns:
            [`CascadeForSequenceClassification`], in eval mode.
        """
        if isinstance(members, (str, os.PathLike, PreTrainedModel)) or len(members) < 2:
            raise ValueError("a cascade has at least two members: from_members([small, large])")
        of_members = set(FastBertConfig.__dataclass_fields__).difference(PreTrainedConfig.__dataclass_fields__)
        for name in of_members.intersection(kwargs):
            raise ValueError(
                f"{name}={kwargs[name]!r} is not for a cascade, whose members each have a {name} of their own: set it "
                f"before, as in member.config.{name} = {kwargs[name]!r}, where a member is a FastBERT model."
            )
        attn_implementation = kwargs.pop("attn_implementation", None)
        for name in set(kwargs).difference(LOADING_ARGUMENTS):
            raise TypeError(
                f"unexpected {name}: give tokenizers, exit_policy, speed, attn_implementation, or arguments of "
                f"from_pretrained ({', '.join(LOADING_ARGUMENTS)})."
            )
        models = [as_member(member, **kwargs) for member in members]
        if any(is_quantised_config(model.config) or has_int8_layers(model) for model in models):
            raise ValueError(
                "a member is quantised: put the members together as they were before, and quantise the cascade, with "
                "cascade.use_int8_layers()."
            )
        check_order(models)
        dtype = common_dtype(models, kwargs.get("dtype"))
        processor = CascadeProcessor.from_members(members, tokenizers, **kwargs)
        config = CascadeConfig(
            members=[model.config for model in models],
            own_tokenizers=processor is not None and processor.own_tokenizers,
            exit_policy=exit_policy,
            speed=speed,
        )
        with torch.device("meta"):  # all weights are the members' own
            cascade = cls(config)
        cascade.members, config.members = nn.ModuleList(models), [model.config for model in models]
        config.exit_policy, config.dtype = exit_policy, dtype  # those of every member
        cascade.processor = processor
        if attn_implementation is not None:
            cascade.set_attn_implementation(attn_implementation)
        return cascade.to(models[-1].device, dtype).eval()

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs):
        """Save the cascade as any model, and the tokenizers of its `processor` where it has one."""
        if self.processor is not None and is_main_process:
            self.processor.save_pretrained(save_directory)
        elif is_main_process:
            warn_of_other_tokenizer(save_directory, self.config)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False):
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        for member in self.members:
            member.set_attn_implementation(attn_implementation, allow_all_kernels)

    @untraced_forward
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        task_type_ids: torch.Tensor | None = None,
        speed: float | list[float] | torch.Tensor | None = None,
        exit_policy: str | None = None,
        retention: float | None = None,
        speedup: float | list[float] | torch.Tensor | None = None,
        member_inputs: Sequence[Mapping[str, torch.Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        max_disagreement: float | list[float] | torch.Tensor | None = None,
        confidence: float | None = None,
    ) -> FastBertSequenceClassifierOutput:
        """
        Answer a padded batch.

        Args:
            input_ids, attention_mask, token_type_ids, task_type_ids: What the tokenizer gave, `[batch_size, length]`.
            labels (`torch.Tensor` of shape `[batch_size]`, or `[batch_size, num_labels]`, *optional*):
                For the loss of the answers: label ids, or probabilities.
            speed (`float`, sequence or tensor of `batch_size` numbers, *optional*):
                In [0, 1], for all rows or one per row: the uncertainty below which a member answers. Rows at speed 0,
                and all without a speed, are answered by the last member, and no other runs on them.
            exit_policy (`str`, *optional*): As in [`CascadeConfig`], whose own is used unless given.
            retention (`float`, *optional*): As in a FastBERT model, for those members that make texts shorter.
            speedup (`float`, sequence or tensor of `batch_size` numbers, *optional*):
                As in a FastBERT model: how many times less than with the last member alone a row shall cost.
            max_disagreement (`float`, sequence or tensor, *optional*), confidence (`float`, *optional*):
                As in a FastBERT model: the share of the answers that may differ from those of the last member.
            member_inputs (sequence of `dict`, *optional*):
                In place of `input_ids` and the others where every member has its own tokenizer: what each gave.
            output_hidden_states, output_attentions (`bool`, *optional*): Not available; a member may return the first.
        """
        if output_hidden_states or output_attentions:
            raise ValueError(
                "a cascade returns no hidden states and no attentions: ask a member, as in "
                "cascade.members[0](input_ids, attention_mask, output_hidden_states=True)"
            )
        names = ("input_ids", "attention_mask", "token_type_ids", "task_type_ids")
        given = dict(zip(names, (input_ids, attention_mask, token_type_ids, task_type_ids), strict=True))
        inputs = inputs_of_members(given, member_inputs, self.config)
        num_rows = len(inputs[0]["input_ids"])
        if labels is not None and torch.is_grad_enabled():  # a training without train() may follow
            for member in self.members:
                member._teacher_digest = member._weights_digest = None
        dials = {"speed": speed, "speedup": speedup, "max_disagreement": max_disagreement}
        speed = speed_of_call(self, dials, confidence=confidence, exit_policy=exit_policy, retention=retention)
        thresholds = self.thresholds_at(row_speeds(speed, num_rows))
        policy = self.policy(exit_policy)
        members = [
            Member(engine, of_member, partial(embed_padded, member, own))
            for engine, member, of_member, own in zip(
                self.engines(False, retention), self.members, thresholds, inputs, strict=True
            )
        ]
        answers = answer_rows(members, policy)
        if not self.training:
            answers.check_finite()
        return FastBertSequenceClassifierOutput(
            loss=None if labels is None else policy.task.mean_loss(answers.logits, labels),
            logits=answers.logits,
            exit_layer=answers.exit_layer,
            uncertainty=answers.uncertainty,
            exit_member=answers.exit_member,
        )

    def predict(
        self,
        encoded_texts: Iterable[Any] | Mapping[str, Any],
        speed: float | Iterable[float] | None = None,
        exit_policy: str | None = None,
        retention: float | None = None,
        speedup: float | Iterable[float] | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        rebatch: bool = True,
        on_error: str = "raise",
        max_disagreement: float | Iterable[float] | None = None,
        confidence: float | None = None,
    ) -> Iterator[Prediction]:
        """
        Answer texts of any number in their order, as [`FastBertForSequenceClassification.predict`], through the
        members. Where each has its own tokenizer, `encoded_texts` is what the [`CascadeProcessor`] returns.
        """
        check_on_error(on_error)
        policy = self.policy(exit_policy)
        dials = {"speed": speed, "speedup": speedup, "max_disagreement": max_disagreement}
        asked = {"exit_policy": exit_policy, "retention": retention}
        speed = speed_of_call(self, dials, streams=True, confidence=confidence, **asked)
        text_configs = [member.text_config for member in self.config.members]
        texts = read_texts(encoded_texts, checked_speeds(speed), text_configs, self.config.own_tokenizers, on_error)
        return answer_texts(
            self,
            self.engines(True, retention),
            texts,
            self.thresholds_at,
            policy,
            batch_size,
            batch_tokens,
            rebatch,
            on_error,
        )

    def check_retention(self, retention: float | None) -> None:
        """Raise a `ValueError` unless `retention` may be that of a call of this cascade."""
        check_retention(retention, *(member.coarsening for member in self.config.members))

    def engines(self, inference: bool, retention: float | None = None) -> list[TorchEngine]:
        """Return what runs each member. Arguments as in [`FastBertForSequenceClassification.engine`]."""
        self.check_retention(retention)
        return [member.engine(inference, retention if member.config.coarsening else None) for member in self.members]

    def policy(self, exit_policy: str | None = None, patience: int | None = None) -> ExitPolicy:
        """Return the exit policy of a call: the config's unless the call names one."""
        if exit_policy not in (None, *CASCADE_POLICIES) or patience is not None:
            name = f"exit_policy={exit_policy!r}" if patience is None else f"patience={patience!r}"
            raise ValueError(f"{name} is not for a cascade; its policies are {', '.join(CASCADE_POLICIES)}.")
        return ExitPolicy.of(self.config, exit_policy)

    def thresholds_at(self, speeds: torch.Tensor) -> list[torch.Tensor]:
        """Return the thresholds of every member at the speeds of texts, `[texts, L]` each."""
        of_members = config_thresholds(self.config, speeds)
        for number, (member, own) in enumerate(zip(self.members, of_members, strict=True), start=1):
            try:
                member.checked_thresholds(own)
            except ValueError as error:
                raise ValueError(f"member {number}: {error}") from None
        return of_members


def embed_padded(
    model: FastBertForSequenceClassification, inputs: Mapping[str, torch.Tensor], rows: torch.Tensor
) -> list[tuple[torch.Tensor, PackedBatch]]:
    """Pack rows of a padded batch and run the embedding layer of a member on them."""
    chosen = rows.to(inputs["input_ids"].device)
    own = {name: value[chosen] for name, value in inputs.items()}
    packed_batch, packed, padding = model.fastbert.pack(rows=rows, **own)
    return [model.engine().embed(packed_batch, packed, padding)]


def inputs_of_members(
    shared: Mapping[str, torch.Tensor | None],
    member_inputs: Sequence[Mapping[str, torch.Tensor]] | None,
    config: CascadeConfig,
) -> list[dict[str, torch.Tensor]]:
    """Return the tensors of a call of `forward` for each member, checked to be of equally many rows."""
    number, given = len(config.members), {name: value for name, value in shared.items() if value is not None}
    if config.own_tokenizers == (member_inputs is None) or (member_inputs is not None and given):
        wanted = "of its own: give member_inputs alone, one dict for each."
        wanted = wanted if config.own_tokenizers else "that it shares: give input_ids, and no member_inputs."
        raise ValueError(f"every member of this cascade has a tokenizer {wanted}")
    inputs = [given] * number
    if member_inputs is not None:
        inputs = [{name: value for name, value in own.items() if value is not None} for own in member_inputs]
    unknown = sorted({name for own in inputs for name in own} - set(shared))
    if unknown:
        raise ValueError(f"the inputs of a member are {', '.join(shared)}, not {', '.join(unknown)}: leave them out.")
    if len(inputs) != number or any(own.get("input_ids") is None or own["input_ids"].dim() != 2 for own in inputs):
        raise ValueError(
            f"each of the {number} members needs input_ids of shape [batch_size, sequence_length], as its tokenizer "
            'gives them with padding=True, return_tensors="pt".'
        )
    rows = {len(value) for own in inputs for value in own.values()}
    if len(rows) > 1:
        raise ValueError(f"the inputs of one call are of equally many rows, got {sorted(rows)}.")
    if rows == {0}:
        raise ValueError("the batch has no rows: give at least one text.")
    return inputs


def check_order(models: Sequence[PreTrainedModel]) -> None:
    """Raise unless no member is cheaper than the one before: by the weights that each token meets in the layers."""
    costs = [
        sum(weight.numel() for layer in model.fastbert.layers() for weight in layer.parameters()) for model in models
    ]
    for number, (before, cost) in enumerate(pairwise(costs), start=2):
        if cost < before:
            raise ValueError(
                f"members go from cheap to expensive, but member {number} has {cost:,} weights in its layers and the "
                f"one before it {before:,}: change their order."
            )


def as_member(name_or_path: str | os.PathLike | PreTrainedModel, **kwargs) -> FastBertForSequenceClassification:
    """Return a FastBERT model as it is, or a stock classifier as one that answers at its last layer alone."""
    is_loaded = isinstance(name_or_path, PreTrainedModel)
    if not is_loaded and not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(
            f"a member is a folder, the id of a repository or a loaded model, got {type(name_or_path).__name__}. "
            "Example: from_members(['org/small-classifier', 'org/large-classifier'])"
        )
    config = name_or_path.config if is_loaded else AutoConfig.from_pretrained(name_or_path, **kwargs)
    if config.model_type == "fastbert_cascade":
        raise ValueError("a cascade cannot be a member of another: give its members.")
    if config.model_type == "fastbert":
        if not is_loaded:
            model = FastBertForSequenceClassification.from_pretrained(name_or_path, **kwargs)
        elif hasattr(name_or_path, "exits"):
            model = copy.deepcopy(name_or_path).eval()
        else:
            raise ValueError(f"{type(name_or_path).__name__} has no exits: give a FastBertForSequenceClassification.")
        refuse_untrained_exits(model)
        return model
    # Students that share the teacher's pooler are a few weights each, and are never asked.
    exits = {"exit_type": "linear", "share_exit_pooler": True, "min_exit_layer": config.num_hidden_layers}
    return FastBertForSequenceClassification.from_classifier(name_or_path, **exits, **kwargs)


def common_dtype(models: Sequence[PreTrainedModel], dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the dtype that the caller asks for, or that all members have."""
    dtypes = [dtype_of(dtype) or model.dtype for model in models]
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"the members are of {', '.join(map(str, dtypes))}, but a cascade is saved in one dtype: choose it, as in "
            "from_members([...], dtype=torch.float32)"
        )
    return dtypes[0]


def refuse_untrained_exits(model: FastBertForSequenceClassification) -> None:
    """Raise a `ValueError` if exits that may answer are as they were made: their biases are zero."""
    config, last = model.config, model.config.num_hidden_layers
    exits = exit_range(last, config.min_exit_layer, config.max_layers)
    untrained = [depth for depth in exits if depth < last and not model.exits[depth - 1].out_proj.bias.any()]
    if untrained:
        raise ValueError(
            f"the exits after layers {untrained} of a member were never trained, but may answer. Self-distil the "
            f"member first, or let it answer at its end alone: member.config.min_exit_layer = {last}"
        )


__all__ = ["CascadeForSequenceClassification"]

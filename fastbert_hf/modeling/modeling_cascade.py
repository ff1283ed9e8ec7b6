"""CascadeForSequenceClassification: complete classifiers, smallest first, each asked what the one before left open."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import can_return_tuple

from .answers import Answer, CascadeSequenceClassifierOutput, in_order
from .cascade_inputs import (
    CascadeText,
    check_order,
    inputs_of_members,
    load_tokenizers,
    read_cascade,
    save_tokenizers,
    tokenizers_of,
)
from .checkpoint_checks import check_cascade_weights
from .configuration_cascade import CascadeConfig
from .encoded_texts import rows_of
from .exit_policies import exit_range, row_speeds
from .modeling_fastbert import FastBertForSequenceClassification
from .prediction import PredictionSettings, answer_block, checked_speeds, predict
from .pretrained_fastbert import DOWNLOAD_ARGUMENTS, FastBertPreTrainedModel
from .stock_checkpoints import dtype_of
from .texts_in_flight import TextsInFlight


class CascadeForSequenceClassification(FastBertPreTrainedModel):
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
    >>> cascade.save_pretrained("outputs/cascade")
    >>> classifier = pipeline("fast-text-classification", model="outputs/cascade")
    >>> classifier("I would go there again.", speed=0.3)
    [{'label': 'positive', 'score': 0.98, 'exit_layer': 2, 'exit_member': 1}]
    ```
    """

    config_class = CascadeConfig
    base_model_prefix = "cascade"
    supports_gradient_checkpointing = False
    _check_weights = staticmethod(check_cascade_weights)

    def __init__(self, config: CascadeConfig):
        super().__init__(config)
        if not config.members:
            raise ValueError(
                "the config names no members. Example: CascadeConfig(members=[small.config, large.config])"
            )
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"problem_type={config.problem_type!r} is not supported: a cascade classifies each text into one of "
                "its labels. Example: problem_type=None"
            )
        for member in config.members:
            member._attn_implementation = config._attn_implementation
        self.num_labels = config.num_labels
        self.members = nn.ModuleList(FastBertForSequenceClassification(member) for member in config.members)
        # One for each member where `config.own_tokenizers`, else the one of all, if it is known.
        self.tokenizers: list[PreTrainedTokenizerBase] | None = None
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs):
        """As [`FastBertForSequenceClassification.from_pretrained`], and with the tokenizers of the members."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for member in model.members:
            member._freeze_students()
        if pretrained_model_name_or_path is not None:
            download = {name: kwargs[name] for name in DOWNLOAD_ARGUMENTS if name in kwargs}
            model.tokenizers = load_tokenizers(pretrained_model_name_or_path, model.config, **download)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """
        As `PreTrainedModel.save_pretrained`, and with the tokenizers: that of the first member, or of all, in the
        folder itself, and those of the others in `member_2`, ... where they differ.
        """
        if push_to_hub:
            raise ValueError(
                "push_to_hub=True would leave the tokenizers behind: call cascade.push_to_hub(repo_id) instead."
            )
        if self.config.own_tokenizers:
            self.known_tokenizers()  # without them it could not be loaded again
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            save_tokenizers(save_directory, self.tokenizers or ())

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
        Puts two or more classifiers of the same labels one behind the other, cheapest first.

        Args:
            members (sequence of `str`, `PathLike` or `PreTrainedModel`):
                Stock classifiers of supported families, which answer at their last layer, or FastBERT models, in which
                a text can also leave early. Of loaded models copies are made.
            tokenizers (sequence, *optional*):
                One for each member. Those of the members' own folders or repositories unless given; needed for loaded
                models that read different vocabularies. One serves all where they differ in nothing, not even in
                the length at which they cut a text.
            exit_policy (`str`): As in [`CascadeConfig`].
            speed (`float`): The speed that the pipeline uses when the call names none.
            kwargs: Arguments of `from_pretrained` (`revision`, `token`, `dtype`, ...), for every member.

        Returns:
            [`CascadeForSequenceClassification`], in eval mode.
        """
        if isinstance(members, (str, os.PathLike, PreTrainedModel)) or len(members) < 2:
            raise ValueError("a cascade has at least two members: from_members([small, large])")
        attn_implementation = kwargs.pop("attn_implementation", None)
        models = [as_member(member, **kwargs) for member in members]
        check_order(models)
        dtype = common_dtype(models, kwargs.get("dtype"))
        tokenizers, own_tokenizers = tokenizers_of(members, models, tokenizers, **kwargs)
        config = CascadeConfig(
            members=[model.config for model in models],
            own_tokenizers=own_tokenizers,
            exit_policy=exit_policy,
            speed=speed,
        )
        with torch.device("meta"):  # all weights are the members' own
            cascade = cls(config)
        cascade.members, config.members = nn.ModuleList(models), [model.config for model in models]
        config.exit_policy, config.dtype = exit_policy, dtype  # those of every member
        cascade.tokenizers = tokenizers
        if attn_implementation is not None:
            cascade.set_attn_implementation(attn_implementation)
        return cascade.to(models[-1].device, dtype).eval()

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False):
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        for member in self.members:
            member.set_attn_implementation(attn_implementation, allow_all_kernels)

    def exits_of(self, member: FastBertForSequenceClassification) -> range:
        """The layers of a member whose exits may answer."""
        config = member.config
        return exit_range(config.num_hidden_layers, config.min_exit_layer, config.max_layers)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        task_type_ids: torch.Tensor | None = None,
        speed: float | list[float] | torch.Tensor | None = None,
        member_inputs: Sequence[Mapping[str, torch.Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> CascadeSequenceClassifierOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, task_type_ids (`torch.Tensor` of shape `[batch_size, length]`):
                What the tokenizer gave, padded, as for the stock classifiers.
            labels (`torch.Tensor` of shape `[batch_size]`, or `[batch_size, num_labels]`, *optional*):
                For the cross entropy of the answers: label ids, or probabilities.
            speed (`float`, sequence or tensor of `batch_size` numbers, *optional*):
                In [0, 1], for all rows or one per row: the uncertainty below which a member answers. Rows at speed 0,
                and all without a speed, are answered by the last member, and no other runs on them.
            member_inputs (sequence of `dict`, *optional*):
                In place of `input_ids` and the others where every member has its own tokenizer: what each of them
                gave.
            output_hidden_states, output_attentions (`bool`, *optional*): Not available; a member may return the first.

        Returns:
            [`CascadeSequenceClassifierOutput`]
        """
        if output_hidden_states or output_attentions:
            raise ValueError(
                "a cascade returns no hidden states and no attentions: ask a member, as in "
                "cascade.members[0](input_ids, attention_mask, output_hidden_states=True)"
            )
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "task_type_ids": task_type_ids,
        }
        inputs = inputs_of_members(given, member_inputs, self.config)
        num_rows = len(inputs[0]["input_ids"])
        speeds = row_speeds(speed, num_rows)
        # Kept on the CPU, where the rows are.
        layers_before, exit_member = torch.zeros(num_rows, dtype=torch.long), torch.zeros(num_rows, dtype=torch.long)
        open_rows, answers = torch.arange(num_rows), []
        for number, (member, own) in enumerate(zip(self.members, inputs, strict=True), start=1):
            is_last = number == len(self.members)
            asked = open_rows if is_last else open_rows[speeds[open_rows] > 0]
            if len(asked) == 0:
                continue
            places = asked.to(own["input_ids"].device)
            hidden_states, packed_batch, _ = member.fastbert.embed(**{name: own[name][places] for name in own})
            packed_batch = replace(packed_batch, rows=asked[packed_batch.rows])
            exits = self.exits_of(member)
            texts = TextsInFlight(packed_batch, hidden_states, speeds[packed_batch.rows])
            for leaving in member.answer_batch(texts, exits):
                if leaving.exit_layer == exits[-1] and not is_last:
                    # Here also texts answered of which it is not sure. NaN is no reason to ask another member.
                    leaving = leaving.keep(~(leaving.uncertainty.cpu() >= speeds[leaving.rows]))
                answers.append(leaving)
                exit_member[leaving.rows] = number
            going_on = asked[exit_member[asked] == 0]
            layers_before[going_on] += exits[-1]
            open_rows = open_rows[exit_member[open_rows] == 0]
        logits, uncertainty, exit_layer = in_order(answers)
        if not self.training and uncertainty.isnan().any():
            raise ValueError(
                f"the logits of rows {uncertainty.isnan().nonzero()[:, 0].tolist()} are not finite, so there is no "
                "answer: check the weights of every member, and the inputs, for NaN and infinity."
            )
        if labels is not None and not labels.is_floating_point():
            labels = labels.view(-1)
        return CascadeSequenceClassifierOutput(
            loss=None if labels is None else nn.functional.cross_entropy(logits.float(), labels),
            logits=logits,
            exit_layer=exit_layer + layers_before.to(exit_layer.device),
            uncertainty=uncertainty,
            exit_member=exit_member.to(exit_layer.device),
        )

    def encode(self, texts: list[str], text_pairs: list[str] | None = None, **kwargs) -> list[Any]:
        """
        What `predict` takes: texts encoded by the tokenizer, or by that of every member.

        Args:
            texts (`list[str]`): Texts, or the first ones of pairs.
            text_pairs (`list[str]`, *optional*): The second ones.
            kwargs: Arguments of the tokenizers, such as `truncation=True`.
        """
        encoded = [rows_of(tokenizer(texts, text_pairs, **kwargs)) for tokenizer in self.known_tokenizers()]
        return list(zip(*encoded, strict=True)) if self.config.own_tokenizers else list(encoded[0])

    def known_tokenizers(self) -> list[PreTrainedTokenizerBase]:
        """`tokenizers`, or a `ValueError` where they are not known."""
        if self.tokenizers is None:
            number = len(self.members) if self.config.own_tokenizers else 1
            raise ValueError(
                "the cascade does not know its tokenizers: name them, as in from_members(members, tokenizers=[...]), "
                f"or set cascade.tokenizers to a list of {number}."
            )
        return self.tokenizers

    def predict(
        self,
        encoded_texts: Iterable[Any] | Mapping[str, Any],
        speed: float | Iterable[float] | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        regroup: bool = True,
    ) -> Iterator[Answer]:
        """
        As [`FastBertForSequenceClassification.predict`], through the members: answers texts of any number in their
        order.

        Args:
            encoded_texts (iterable):
                As there; where every member has its own tokenizer, for each text what each of them gave, as
                [`encode`] returns it.

            The other arguments are those of [`FastBertForSequenceClassification.predict`].

        Returns:
            An iterator over one [`Answer`] for each text, with its `exit_member`.
        """
        settings = PredictionSettings.of(self, batch_size, batch_tokens, regroup)
        texts = read_cascade(encoded_texts, checked_speeds(speed), self.config)
        return predict(texts, lambda block, tokens: self._answer_block(block, settings, tokens), settings)

    def _answer_block(self, texts: list[CascadeText], settings: PredictionSettings, batch_tokens: int) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(texts)
        layers_before = [0] * len(texts)
        # Uncertainties have no more digits either.
        speeds = torch.tensor([text.speed for text in texts], dtype=torch.float32).tolist()
        for number, member in enumerate(self.members, start=1):
            is_last = number == len(self.members)
            asked = [row for row, text in enumerate(texts) if answers[row] is None and (is_last or text.speed > 0)]
            if not asked:
                continue
            exits, own = self.exits_of(member), [texts[row].of_members[number - 1] for row in asked]
            for row, answer in zip(asked, answer_block(member, own, exits, settings, batch_tokens), strict=True):
                # NaN is no reason to ask the next member: it is an error.
                if is_last or not answer.uncertainty >= speeds[row]:
                    answers[row] = answer._replace(
                        exit_layer=layers_before[row] + answer.exit_layer, exit_member=number
                    )
                else:
                    layers_before[row] += exits[-1]
        return answers


def as_member(name_or_path: str | os.PathLike | PreTrainedModel, **kwargs) -> FastBertForSequenceClassification:
    """A FastBERT model as it is, or a stock classifier as one that answers at its last layer alone."""
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
    return FastBertForSequenceClassification.from_classifier(
        name_or_path,
        exit_type="linear",
        share_exit_pooler=True,
        min_exit_layer=config.num_hidden_layers,
        **kwargs,
    )


def common_dtype(models: Sequence[PreTrainedModel], dtype: str | torch.dtype | None) -> torch.dtype:
    """The one that the caller asks for, or that all members have."""
    if dtype_of(dtype) is not None:
        return dtype_of(dtype)
    dtypes = [model.dtype for model in models]
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"the members are of {', '.join(map(str, dtypes))}, but a cascade is saved in one dtype: choose it, as in "
            "from_members([...], dtype=torch.float32)"
        )
    return dtypes[0]


def refuse_untrained_exits(model: FastBertForSequenceClassification) -> None:
    """Raises a `ValueError` if exits that may answer are as they were made: their biases are zero."""
    config = model.config
    exits = exit_range(config.num_hidden_layers, config.min_exit_layer, config.max_layers)
    students = [depth for depth in exits if depth < config.num_hidden_layers]
    untrained = [depth for depth in students if not model.exits[depth - 1].out_proj.bias.any()]
    if untrained:
        raise ValueError(
            f"the exits after layers {untrained} of a member were never trained, but may answer. Self-distil the "
            "member first, or let it answer at its end alone: member.config.min_exit_layer = "
            f"{config.num_hidden_layers}"
        )


__all__ = ["CascadeForSequenceClassification"]

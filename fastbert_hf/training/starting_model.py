"""What `train` starts from: an encoder, a fine-tuned classifier or a FastBERT model, and rows in its tokens."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.configuration_fastbert import FastBertConfig
from ..modeling.families import max_text_tokens
from ..modeling.modeling_fastbert import CLASSIFIERS, FastBertForSequenceClassification
from ..modeling.stock_checkpoints import STOCK_HEADS, head_names, split_arguments
from ..modeling.tasks import TASKS
from ..word_rows import WORDS
from .stages import ExitTraining, FineTuning, Stage


if TYPE_CHECKING:
    from ..data import Splits


# Fields of the config that a model with exits has been built with.
BUILT_WITH = ("exit_type", "teacher_exit_type", "share_exit_pooler", "exit_hidden_size", "exit_num_attention_heads")


@dataclass(frozen=True)
class StartingModel:
    """
    What a training starts from.

    Args:
        model (`str`, `PathLike` or `PreTrainedModel`): As in [`train`].
        own_config (`PreTrainedConfig`): The model's.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        config (`dict`): Fields of [`FastBertConfig`] to set.
    """

    model: str | os.PathLike | PreTrainedModel
    own_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    config: dict[str, Any]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, config: dict[str, Any]) -> StartingModel:
        """Load the config and the tokenizer, and check what is to be changed."""
        try:
            own_config = model.config if isinstance(model, PreTrainedModel) else AutoConfig.from_pretrained(model)
            if tokenizer is None:
                text_config = getattr(own_config, "text_config", own_config)
                is_loaded = isinstance(model, PreTrainedModel)
                tokenizer = (own_config.name_or_path or text_config.name_or_path) if is_loaded else model
            if not tokenizer:
                raise ValueError("it does not say where its tokenizer is: give tokenizer=name")
            if isinstance(tokenizer, (str, os.PathLike)):
                tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(f"the model cannot be loaded: {error}") from error
        start = cls(model, own_config, tokenizer, config)
        split_arguments(FastBertConfig, config)
        FastBertConfig(text_config=start.text_config, **config)
        for name in BUILT_WITH if start.has_exits else ():
            used = getattr(own_config, name)
            if config.get(name, used) != used:
                raise ValueError(f"the model was built with {name}={used!r}: leave out {name}={config[name]!r}.")
        return start

    @property
    def has_exits(self) -> bool:
        """Return whether the model is a FastBERT model."""
        return self.own_config.model_type == FastBertConfig.model_type

    @property
    def task(self) -> str:
        """Return what the model is to answer, as its config calls it."""
        own = getattr(self.own_config, "task", None) if self.has_exits else None
        architectures = self.own_config.architectures or []
        for task, head in STOCK_HEADS.items():
            own = own or (task if any(name.endswith(head.suffix) for name in architectures) else None)
        return self.config.get("task", own or "text-classification")

    @property
    def task_name(self) -> str:
        """Return the name of the [`Task`], which tells what labels are."""
        task = TASKS[self.task]
        if not isinstance(task, dict):
            return task.name
        return self.config.get("problem_type", self.own_config.problem_type) or next(iter(task))

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """Return the class of the model with exits."""
        return CLASSIFIERS[self.task]

    @property
    def text_config(self) -> PreTrainedConfig:
        """Return the config of the encoder."""
        return self.own_config.text_config if self.has_exits else self.own_config

    def stages(self) -> list[Stage]:
        """Return the stages that the model has still to go through."""
        return [ExitTraining()] if self._is_fine_tuned() else [FineTuning(), ExitTraining()]

    def _is_fine_tuned(self) -> bool:
        is_loaded = isinstance(self.model, PreTrainedModel)
        architectures = [type(self.model).__name__] if is_loaded else self.own_config.architectures or []
        if not any(name.endswith(STOCK_HEADS[self.task].suffix) for name in architectures):
            return False
        if not is_loaded:
            return True
        # A head that Transformers has just put on an encoder has biases of zero, which the first step changes.
        if self.has_exits:
            return bool(self.model.teacher.out_proj.bias.any())
        return bool(self.model.get_submodule(head_names(self.own_config, self.task)[-1]).bias.any())

    def encoded(
        self, splits: Splits, stages: Sequence[Stage], columns: dict[str, Any], max_length: int | None
    ) -> tuple[Splits, dict[str, int]]:
        """Return the rows as token ids, and the id of each label."""
        from ..data import check_rows, label_names
        from ..label_kinds import of_passages

        columns = {**columns, "task": self.task_name}
        if columns["text_column"] == "text" and "text" not in splits.train.column_names:
            columns["text_column"] = WORDS if WORDS in splits.train.column_names else "text"
        if self.task == "question-answering":
            columns = {**of_passages(columns), "task": self.task_name}
        if columns["text_pair_column"] is None and "text_pair" in splits.train.column_names:
            columns = {**columns, "text_pair_column": "text_pair"}
        has_labels = {
            "training": any(stage.needs_labels for stage in stages),
            "validation": splits.validation is not None and columns["label_column"] in splits.validation.column_names,
            "unlabeled": False,
        }
        for (name, labelled), rows in zip(has_labels.items(), splits, strict=True):
            if rows is not None:
                check_rows(rows, name, **{**columns, "label_column": columns["label_column"] if labelled else None})
        names = dict(self.own_config.id2label)
        if not stages[0].needs_teacher and not self.has_exits:
            names = dict(enumerate(label_names(splits.train, columns["label_column"], columns["task"])))
        label2id = {name: index for index, name in names.items()}
        limits = (max_length, self.tokenizer.model_max_length, max_text_tokens(self.text_config))
        max_length = min(limit for limit in limits if limit is not None)
        trains, validates, _ = has_labels.values()
        return splits.encoded(self.tokenizer, label2id, trains, validates, **columns, max_length=max_length), label2id

    def load(self, stage: Stage, label2id: dict[str, int]) -> FastBertForSequenceClassification:
        """Return the model that the first stage trains."""
        if self.has_exits:
            if isinstance(self.model, PreTrainedModel):
                # As if it had just been loaded: its last training may have left most of it frozen.
                fastbert = copy.deepcopy(self.model).requires_grad_(True)
                for parameter in fastbert.student_parameters():
                    parameter.requires_grad = False
            else:
                fastbert = self.model_class.from_pretrained(self.model)
            for name, value in self.config.items():
                setattr(fastbert.config, name, value)
            return fastbert
        if stage.needs_teacher:
            return self.model_class.from_classifier(self.model, **self.config)
        id2label = {index: name for name, index in label2id.items()}
        labels = {"id2label": id2label, "label2id": label2id}
        return self.model_class.from_backbone(self.model, **labels, **self.config)

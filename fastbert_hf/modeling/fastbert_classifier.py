"""What all FastBERT classifiers share: a stock encoder run on packed batches, with an exit after every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from numbers import Integral
from os import PathLike
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .compiled_layers import CompilesLayers, untraced_forward
from .configuration_fastbert import FastBertConfig
from .dials import speed_of_call
from .encoded_texts import EncodedText, check_on_error, checked_speeds, read_texts
from .engine import TorchEngine
from .exit_classifiers import ExitClassifier, build_exits
from .exit_policies import ExitPolicy, exit_range, exit_thresholds, row_speeds
from .feed_forward_settings import replace_feed_forward
from .modeling_outputs import FastBertSequenceClassifierOutput, Prediction
from .packed_attention import PACKED_ATTENTION
from .packed_encoder import FastBertModel, refuse_attentions
from .pretrained_fastbert import FastBertPreTrainedModel
from .scheduler import Member, Trace, answer_rows, answer_texts
from .stock_checkpoints import classifier_config, keep_first_layers, load_classifier, load_encoder, split_arguments
from .tasks import task_of
from .teacher_digest import ChecksStudents
from .token_coarsening import Coarsening, check_retention


# The class for each `task` of a config.
CLASS_NAMES = {
    "text-classification": "FastBertForSequenceClassification",
    "token-classification": "FastBertForTokenClassification",
    "question-answering": "FastBertForQuestionAnswering",
}


NEEDS_MASK = (
    "max_disagreement is certified for the first tokens of words, where tokens are labelled: give their token_mask, "
    "or use the pipeline, which does."
)


def with_mask(text: EncodedText) -> EncodedText:
    """Return a text that says of which tokens a label is wanted, or raise a `ValueError`."""
    if text.error is None and "token_mask" not in text.of_members[0]:
        raise ValueError(f"text {text.position}: {NEEDS_MASK}")
    return text


class FastBertClassifier(ChecksStudents, CompilesLayers, FastBertPreTrainedModel):
    """
    What the classifiers of texts and of tokens share: all but the task that they are for. `exits[-1]` is the teacher,
    `exits[:-1]` are the students.

    Args:
        config ([`FastBertConfig`]): The model's config.
    """

    task: str  # of the config

    def __init__(self, config: FastBertConfig):
        super().__init__(config)
        if config.task != self.task:
            raise ValueError(
                f"{type(self).__name__} is for task={self.task!r}, and this config is for {config.task!r}: use "
                f"{CLASS_NAMES[config.task]}, or FastBertConfig(task={self.task!r}, ...)."
            )
        task_of(config)
        self.num_labels = config.num_labels
        self.fastbert = FastBertModel(config)
        self.supports_gradient_checkpointing = self.fastbert.supports_gradient_checkpointing
        exits, self.shared_pooler = build_exits(config)
        self.exits = exits  # after the pooler: new weights and saved optimizers depend on the order
        self._freeze_students()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            # Those of the exits alone: the backbone initialises itself. Its own deviation of 0.02 would leave the
            # logits of so narrow a stack nearly constant, and the first epoch nearly lost.
            init.xavier_uniform_(module.weight)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | PathLike | PreTrainedModel,
        num_labels: int | None = None,
        num_hidden_layers: int | None = None,
        **kwargs,
    ) -> Self:
        """
        Put a new teacher and new students on a pretrained encoder. Then fine-tune (stage 1) and self-distil (stage
        2).

        Args:
            name_or_path (`str`, `PathLike` or `PreTrainedModel`):
                A checkpoint of a supported family, with or without a head of its own, or a loaded model, which is
                copied and left alone.
            num_labels (`int`, *optional*): Number of labels; that of `id2label`, or 2, unless given.
            num_hidden_layers (`int`, *optional*): Keeps only so many of the encoder's layers, the first ones.
            kwargs:
                Fields of [`FastBertConfig`] (`exit_type="linear"`, `id2label={...}`), and arguments of
                `from_pretrained` (`revision`, `token`, `cache_dir`, ...). `dtype` is float32 unless given.

        Example:

        ```python
        >>> model = FastBertForSequenceClassification.from_backbone("bert-base-uncased", num_labels=2)
        ```
        """
        config_arguments, loading_arguments = cls._split_arguments(kwargs)
        encoder = load_encoder(name_or_path, **loading_arguments)
        if num_hidden_layers is not None:
            keep_first_layers(encoder, num_hidden_layers)
        id2label = config_arguments.get("id2label")
        if id2label is None:
            config_arguments["num_labels"] = 2 if num_labels is None else num_labels
        elif num_labels not in (None, len(id2label)):
            raise ValueError(
                f"num_labels={num_labels}, but id2label names {len(id2label)} labels: leave out num_labels."
            )
        return cls._around(encoder, FastBertConfig(text_config=encoder.config, **config_arguments))

    @classmethod
    def from_classifier(cls, name_or_path: str | PathLike | PreTrainedModel, **kwargs) -> Self:
        """
        Put students under a classifier that was already fine-tuned with stock Transformers. Its own head stays as the
        teacher, so at speed 0 the logits are those of the stock model. Only stage 2 is left to do, and needs no
        labels.

        Args:
            name_or_path (`str`, `PathLike` or `PreTrainedModel`):
                A classifier of a supported family, for the same task, or a loaded one, which is copied and left alone.
            kwargs: As in [`from_backbone`]; the labels are the classifier's.

        Example:

        ```python
        >>> model = FastBertForSequenceClassification.from_classifier("org/my-finetuned-bert")
        ```
        """
        config_arguments, loading_arguments = cls._split_arguments(kwargs)
        if config_arguments.get("feed_forward") is not None:
            raise ValueError(
                "new feed-forward layers would take the place of what the classifier has learnt: leave out "
                "feed_forward, and convert its own with fastbert_hf.training.convert_feed_forward(model, texts)."
            )
        encoder, dense, out_proj = load_classifier(name_or_path, cls.task, **loading_arguments)
        config = FastBertConfig(**classifier_config(encoder.config, config_arguments))
        model = cls._around(encoder, config)
        if dense is not None:
            (model.teacher.pooler or model.shared_pooler).exit_dense.load_state_dict(dense.state_dict())
        model.teacher.out_proj.load_state_dict(out_proj.state_dict())
        return model

    @classmethod
    def _split_arguments(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if kwargs.get("task", cls.task) != cls.task:
            raise ValueError(f"{cls.__name__} is for task={cls.task!r}: leave out task={kwargs['task']!r}.")
        return split_arguments(FastBertConfig, {**kwargs, "task": cls.task})

    @classmethod
    def _around(cls, encoder: PreTrainedModel, config: FastBertConfig) -> Self:
        model = cls._from_config(config, dtype=encoder.dtype)
        if config.feed_forward is not None:
            replace_feed_forward(encoder, config.feed_forward)
        encoder.config._attn_implementation_internal = PACKED_ATTENTION
        model.fastbert.backbone = encoder
        model.config.text_config = encoder.config
        return model.to(encoder.device).eval()

    def _freeze_students(self) -> None:
        for parameter in self.student_parameters():
            parameter.requires_grad = False

    @property
    def teacher(self) -> ExitClassifier:
        """The last exit."""
        return self.exits[-1]

    @property
    def students(self) -> nn.ModuleList:
        """All exits but the last, first to last."""
        return self.exits[:-1]

    def student_modules(self) -> list[nn.Module]:
        """What only the students use: themselves, and a pooler that they share and the teacher does not."""
        shares_with_teacher = self.shared_pooler is None or self.teacher.pooler is None
        return [*self.students] if shares_with_teacher else [*self.students, self.shared_pooler]

    def student_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of `student_modules`."""
        return (parameter for module in self.student_modules() for parameter in module.parameters())

    def exit_names(self) -> list[str]:
        """Return the names of all that is not the backbone, as `modules_to_save` of a PEFT config takes them."""
        names = [f"exits.{index}" for index in range(len(self.exits))]
        return names if self.shared_pooler is None else [*names, "shared_pooler"]

    def _refuse_random_teacher(self) -> None:
        # PEFT makes a new head learn only if it is called "classifier" or "score".
        is_frozen = not any(parameter.requires_grad for parameter in self.teacher.parameters())
        if is_frozen and not self.teacher.out_proj.bias.any():  # as new ones are
            raise ValueError(
                "the teacher is at its random initialisation and asks for no gradients, so the backbone would learn "
                "to serve a head that never learns. With PEFT, name the exits in the config: LoraConfig(..., "
                f"modules_to_save={self.exit_names()}). Without: model.teacher.requires_grad_(True)"
            )

    @untraced_forward
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        task_type_ids: torch.Tensor | None = None,
        speed: float | list[float] | torch.Tensor | None = None,
        min_exit_layer: int | None = None,
        max_layers: int | None = None,
        exit_policy: str | None = None,
        patience: int | None = None,
        retention: float | None = None,
        speedup: float | list[float] | torch.Tensor | None = None,
        output_exit_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        max_disagreement: float | list[float] | torch.Tensor | None = None,
        confidence: float | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> FastBertSequenceClassifierOutput:
        """
        Answer a padded batch. The other arguments are those of [`FastBertModel.forward`].

        Args:
            labels (`torch.Tensor`, *optional*):
                For the loss of the answers. `[batch_size]`: label ids; `[batch_size, num_labels]`: the probabilities
                of another model, which this one is to learn, a 0 or 1 for each of several labels, or the numbers of a
                regression; `[batch_size, sequence_length]`: an id for each token, -100 for those without.
            speed (`float`, sequence or tensor of `batch_size` numbers, *optional*):
                In [0, 1], for all rows or one per row. A row leaves at the first exit whose uncertainty is below its
                speed; the last exit always answers. 0 and `None` run every layer and evaluate no student.
            min_exit_layer (`int`, *optional*): No row leaves before this layer, and no exit before it is evaluated.
            max_layers (`int`, *optional*):
                Every row has answered after this many layers. At speed 0 that exit alone is evaluated.
            exit_policy (`str`, *optional*): As in [`FastBertConfig`], whose own is used unless given.
            patience (`int`, *optional*): As there, for the patience policy.
            retention (`float`, *optional*):
                In (0, 1], for a model with `config.coarsening`: the share of a text's tokens that is left in the end,
                in place of the config's own. 1 leaves all.
            speedup (`float`, sequence or tensor of `batch_size` numbers, *optional*):
                In place of `speed`, for a model that was calibrated ([`calibrate`]): how many times less than at speed
                0 a row shall cost, on average over many texts.
            max_disagreement (`float`, sequence or tensor of `batch_size` numbers, *optional*):
                In place of both, for a model that was calibrated or certified ([`certify`]): the share of the answers
                that may differ from those at speed 0, over many texts like those of the certificate.
            confidence (`float`, *optional*): Of `max_disagreement`; 0.9 unless given.
            token_mask (`torch.Tensor` of shape `[batch_size, sequence_length]`, *optional*):
                Where tokens are labelled: 1 for those whose labels somebody wants, as a rule the first ones of words.
                An exit has to be sure of them alone. All unless given.
            output_exit_logits (`bool`, *optional*): Whether to evaluate every exit on every row. Speed 0 only.
            output_hidden_states (`bool`, *optional*): Whether to return the output of every layer. Speed 0 only.

        Returns:
            [`FastBertSequenceClassifierOutput`]
        """
        refuse_attentions(self.config, output_attentions)
        if labels is not None and self.training and max_layers is None:
            self._refuse_random_teacher()
        if labels is not None and torch.is_grad_enabled():
            self._teacher_digest = self._weights_digest = None  # a training without train() may follow
        packed_batch, inputs, padding = self.fastbert.pack(
            input_ids,
            attention_mask,
            inputs_embeds,
            position_ids,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
        )
        if token_mask is not None and token_mask.shape != padding.shape:
            raise ValueError(
                f"token_mask must be [batch_size, sequence_length] = {list(padding.shape)}, as the input_ids, got "
                f"{list(token_mask.shape)}."
            )
        if max_disagreement is not None and token_mask is None and self.policy().task.layout.per_token:
            raise ValueError(NEEDS_MASK)
        if token_mask is not None:
            packed_batch = replace(packed_batch, counted=padding.unpad(token_mask.bool()))
        asked = {"min_exit_layer": min_exit_layer, "max_layers": max_layers, "retention": retention}
        dials = {"speed": speed, "speedup": speedup, "max_disagreement": max_disagreement}
        asked |= {"exit_policy": exit_policy, "patience": patience}
        speed = speed_of_call(self, dials, confidence=confidence, **asked)
        speeds = row_speeds(speed, padding.shape[0])
        limits = (self.config.num_hidden_layers, min_exit_layer, max_layers)
        thresholds = self.checked_thresholds(exit_thresholds(speeds, *limits))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        needs_trace = output_exit_logits or output_hidden_states
        if needs_trace and (speeds.any() or max_layers is not None):
            raise ValueError(
                "output_exit_logits and output_hidden_states need every layer of every row: leave out speed and "
                "max_layers."
            )
        trace = Trace(bool(output_exit_logits), bool(output_hidden_states)) if needs_trace else None
        engine, policy = self.engine(retention=retention), self.policy(exit_policy, patience)
        member = Member(engine, thresholds, lambda rows: [engine.embed(packed_batch, inputs, padding)])
        answers = answer_rows([member], policy, trace=trace)
        if not self.training:
            answers.check_finite()
        layout, exit_logits, hidden_states = policy.task.layout, None, None
        logits = layout.to_caller(answers.logits, padding)
        if output_exit_logits:
            order = packed_batch.rows.argsort().to(answers.logits.device)
            exit_logits = layout.to_caller(torch.stack(trace.exit_logits, 1)[order], padding)
        if output_hidden_states:
            *states, last = trace.hidden_states
            hidden_states = tuple(map(padding.pad, (*states, engine.final_norm(last))))
        return FastBertSequenceClassifierOutput(
            loss=None if labels is None else policy.task.mean_loss(logits, labels),
            logits=logits,
            exit_layer=answers.exit_layer,
            uncertainty=answers.uncertainty,
            exit_logits=exit_logits,
            hidden_states=hidden_states,
        )

    def predict(
        self,
        encoded_texts: Iterable[Mapping[str, Any]] | Mapping[str, Any],
        speed: float | Iterable[float] | None = None,
        min_exit_layer: int | None = None,
        max_layers: int | None = None,
        exit_policy: str | None = None,
        patience: int | None = None,
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
        Answer texts of any number in their order, fast without a batch size: texts of similar length share a packed
        batch, and those that go on share one with those of other batches. The model must be in eval mode.

        Args:
            encoded_texts (iterable of `Mapping`, or `Mapping` of lists):
                `input_ids` and what else the tokenizer gave to each text, as lists without padding: what
                `tokenizer(texts)` returns, rows of a `datasets` data set, or a stream of such. A stream is read
                up to 16 batches ahead. Where tokens are labelled, `token_mask` may say of which. An exception among
                them is why there is no such text.
            speed (`float` or iterable of `float`, *optional*): In [0, 1], for all or one for each; 0 unless given.
            min_exit_layer, max_layers, exit_policy, patience, retention (*optional*): As in `forward`.
            speedup, max_disagreement (`float` or iterable of `float`, *optional*):
                As in `forward`, for all or one for each.
            confidence (`float`, *optional*): As in `forward`.
            batch_size (`int`, *optional*):
                Reads and answers so many texts at a time, 1 for each as it comes. By the number of tokens unless
                given, which is faster.
            batch_tokens (`int`, *optional*):
                Tokens of a packed batch, about: 1,024 on a CPU and 16,384 on an accelerator unless given.
            rebatch (`bool`): Whether texts that go on may be joined to those of other batches.
            on_error (`str`):
                What becomes of a text that cannot be read or answered. `"raise"`: an error that names its position,
                after the answers of all texts before it. `"return"`: a [`Prediction`] that carries this `error` in
                place of logits. `"skip"`: nothing, so that there are fewer answers than texts.

        Returns:
            An iterator over one [`Prediction`] for each text. What the stream itself raises is raised after the
            answers of all texts before it.

        Example:

        ```python
        >>> answers = model.predict(tokenizer(["first text", "second text"]), speed=0.5)
        >>> [(answer.logits.argmax().item(), answer.exit_layer) for answer in answers]
        [(1, 2), (0, 5)]
        ```
        """
        limits = (self.config.num_hidden_layers, min_exit_layer, max_layers)
        # What is wrong with these is an error now, not at the first answer.
        exit_range(*limits)
        check_on_error(on_error)
        self.check_retention(retention)
        policy = self.policy(exit_policy, patience)
        asked = {"min_exit_layer": min_exit_layer, "max_layers": max_layers, "retention": retention}
        dials = {"speed": speed, "speedup": speedup, "max_disagreement": max_disagreement}
        asked |= {"exit_policy": exit_policy, "patience": patience}
        speed = speed_of_call(self, dials, streams=True, confidence=confidence, **asked)
        texts = read_texts(encoded_texts, checked_speeds(speed), [self.config.text_config], on_error=on_error)
        if max_disagreement is not None and policy.task.layout.per_token:
            texts = map(with_mask, texts)
        engines = [self.engine(inference=True, retention=retention)]

        def thresholds_at(speeds: torch.Tensor) -> list[torch.Tensor]:
            return [self.checked_thresholds(exit_thresholds(speeds, *limits))]

        return answer_texts(self, engines, texts, thresholds_at, policy, batch_size, batch_tokens, rebatch, on_error)

    def policy(self, exit_policy: str | None = None, patience: int | None = None) -> ExitPolicy:
        """Return the exit policy of a call: the config's, with what the call names in its place."""
        policy = ExitPolicy.of(self.config, exit_policy)
        if patience is None:
            return policy
        if not isinstance(patience, Integral) or isinstance(patience, bool) or patience < 1:
            raise ValueError(f"patience must be a whole number of at least 1, got {patience!r}. Example: patience=2")
        if policy.name != "patience":
            raise ValueError(
                f"patience={patience} has no meaning with exit_policy={policy.name!r}: leave it out, or give "
                'exit_policy="patience", too.'
            )
        return replace(policy, patience=int(patience))

    def check_retention(self, retention: float | None) -> None:
        """Raise a `ValueError` unless `retention` may be that of a call of this model."""
        check_retention(retention, self.config.coarsening)

    def engine(self, inference: bool = False, retention: float | None = None) -> TorchEngine:
        """Return what runs the layers and the exits. Arguments as in [`TorchEngine`] and `forward`."""
        self.check_retention(retention)
        coarsening = Coarsening.of(self.config.coarsening, retention)
        return TorchEngine(self.fastbert.backbone, self.exits, self.shared_pooler, inference, coarsening)

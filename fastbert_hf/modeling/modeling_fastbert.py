"""FastBertForSequenceClassification: a stock encoder run on packed batches, with an exit after every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .answers import Answer, FastBertSequenceClassifierOutput, Leaving, in_order
from .configuration_fastbert import FastBertConfig
from .encoded_texts import read_texts
from .encoder_layouts import run_layer
from .exit_classifiers import EXIT_POOLERS, ExitClassifier
from .exit_policies import exit_range, exit_uncertainty, row_speeds
from .packed_batch import PACKED_ATTENTION
from .packed_encoder import FastBertModel, refuse_attentions
from .prediction import PredictionSettings, answer_block, checked_speeds, predict
from .pretrained_fastbert import FastBertPreTrainedModel
from .stock_checkpoints import classifier_config, keep_first_layers, load_classifier, load_encoder, split_arguments
from .texts_in_flight import TextsInFlight


if TYPE_CHECKING:
    # Code beside weights is copied as far as its imports go, and the pipeline must go with it.
    from .pipeline_fastbert import FastTextClassificationPipeline  # noqa: F401


class FastBertForSequenceClassification(FastBertPreTrainedModel):
    """
    A stock encoder with a classifier after every layer, which answers each text with as many layers as it needs
    (FastBERT, Liu et al., ACL 2020). `exits[-1]` is the teacher, `exits[:-1]` are the students.

    As built or loaded, the students ask for no gradients: the model is ready for stage 1, where the stock `Trainer`
    fine-tunes the backbone and the teacher. [`SelfDistillationTrainer`] then turns the students on and the rest off.

    Args:
        config ([`FastBertConfig`]): The model's config.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from fastbert_hf import FastBertForSequenceClassification

    >>> model = FastBertForSequenceClassification.from_pretrained("org/fastbert-chnsenticorp")
    >>> tokenizer = AutoTokenizer.from_pretrained("org/fastbert-chnsenticorp")
    >>> output = model(**tokenizer(["first text", "second text"], padding=True, return_tensors="pt"), speed=0.5)
    >>> output.logits.argmax(-1), output.exit_layer
    ```
    """

    def __init__(self, config: FastBertConfig):
        super().__init__(config)
        if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"num_labels={config.num_labels} with problem_type={config.problem_type!r} is not supported: FastBERT "
                "classifies each text into one of at least two labels. Example: num_labels=2, problem_type=None"
            )
        self.num_labels = config.num_labels
        self.fastbert = FastBertModel(config)
        self.supports_gradient_checkpointing = self.fastbert.supports_gradient_checkpointing
        self.shared_pooler = EXIT_POOLERS[config.exit_type](config) if config.share_exit_pooler else None
        exit_types = [config.exit_type] * (config.num_hidden_layers - 1) + [config.teacher_exit_type]
        self.exits = nn.ModuleList(
            ExitClassifier(config, exit_type, config.share_exit_pooler and exit_type == config.exit_type)
            for exit_type in exit_types
        )
        self._freeze_students()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            # Those of the exits alone: the backbone initialises itself. Its own deviation of 0.02 would leave the
            # logits of so narrow a stack nearly constant, and the first epoch nearly lost.
            init.xavier_uniform_(module.weight)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        # Loading puts new parameters in place of the frozen ones.
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_students()
        return loaded

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | PathLike | PreTrainedModel,
        num_labels: int | None = None,
        num_hidden_layers: int | None = None,
        **kwargs,
    ) -> FastBertForSequenceClassification:
        """
        Puts a new teacher and new students on a pretrained encoder. Then fine-tune (stage 1) and self-distil (stage
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
        config_arguments, loading_arguments = split_arguments(FastBertConfig, kwargs)
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
    def from_classifier(
        cls, name_or_path: str | PathLike | PreTrainedModel, **kwargs
    ) -> FastBertForSequenceClassification:
        """
        Puts students under a classifier that was already fine-tuned with stock Transformers. Its own head stays as the
        teacher, so at speed 0 the logits are those of the stock model. Only stage 2 is left to do, and needs no
        labels.

        Args:
            name_or_path (`str`, `PathLike` or `PreTrainedModel`):
                A sequence classifier of a supported family, or a loaded one, which is copied and left alone.
            kwargs: As in [`from_backbone`]; the labels are the classifier's.

        Example:

        ```python
        >>> model = FastBertForSequenceClassification.from_classifier("org/my-finetuned-bert")
        ```
        """
        config_arguments, loading_arguments = split_arguments(FastBertConfig, kwargs)
        encoder, dense, out_proj = load_classifier(name_or_path, **loading_arguments)
        config = FastBertConfig(**classifier_config(encoder.config, config_arguments))
        model = cls._around(encoder, config)
        (model.teacher.pooler or model.shared_pooler).exit_dense.load_state_dict(dense.state_dict())
        model.teacher.out_proj.load_state_dict(out_proj.state_dict())
        return model

    @classmethod
    def _around(cls, encoder: PreTrainedModel, config: FastBertConfig) -> FastBertForSequenceClassification:
        model = cls._from_config(config, dtype=encoder.dtype)
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
        output_exit_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> FastBertSequenceClassifierOutput:
        """
        Args:
            labels (`torch.Tensor` of shape `[batch_size]`, or `[batch_size, num_labels]`, *optional*):
                For the cross entropy of the answers: label ids, or the probabilities of another model, which this one
                is to learn.
            speed (`float`, sequence or tensor of `batch_size` numbers, *optional*):
                In [0, 1], for all rows or one per row. A row leaves at the first exit whose uncertainty is below its
                speed; the last exit always answers. 0 and `None` run every layer and evaluate no student.
            min_exit_layer (`int`, *optional*): No row leaves before this layer, and no exit before it is evaluated.
            max_layers (`int`, *optional*):
                Every row has answered after this many layers. At speed 0 that exit alone is evaluated.
            output_exit_logits (`bool`, *optional*): Whether to evaluate every exit on every row. Speed 0 only.
            output_hidden_states (`bool`, *optional*): Whether to return the output of every layer. Speed 0 only.

            The other arguments are those of [`FastBertModel.forward`].

        Returns:
            [`FastBertSequenceClassifierOutput`]
        """
        refuse_attentions(self.config, output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states, packed_batch, layout = self.fastbert.embed(
            input_ids,
            attention_mask,
            inputs_embeds,
            position_ids,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
        )
        speeds = row_speeds(speed, layout.shape[0])
        exits = exit_range(self.config.num_hidden_layers, min_exit_layer, max_layers)
        texts = TextsInFlight(packed_batch, hidden_states, speeds[packed_batch.rows])
        exit_logits, states = [], []
        if output_exit_logits or output_hidden_states:
            if speeds.any() or max_layers is not None:
                raise ValueError(
                    "output_exit_logits and output_hidden_states need every layer of every row: leave out speed and "
                    "max_layers."
                )
            exit_logits, states = self._run_every_layer(texts, bool(output_exit_logits), bool(output_hidden_states))
            uncertainty, _ = exit_uncertainty(exit_logits[-1], self.config.exit_policy, self.config.patience)
            answers = [Leaving(packed_batch.rows, exit_logits[-1], uncertainty, len(self.exits))]
        else:
            answers = self.answer_batch(texts, exits)
        logits, uncertainty, exit_layer = in_order(answers)
        if not self.training and uncertainty.isnan().any():
            raise ValueError(
                f"the logits of rows {uncertainty.isnan().nonzero()[:, 0].tolist()} are not finite, so there is no "
                "answer: check the model's weights and inputs for NaN and infinity."
            )
        if labels is not None and not labels.is_floating_point():
            labels = labels.view(-1)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        if output_exit_logits:
            order = packed_batch.rows.argsort().to(logits.device)
        return FastBertSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            exit_layer=exit_layer,
            uncertainty=uncertainty,
            exit_logits=torch.stack(exit_logits, 1)[order] if output_exit_logits else None,
            hidden_states=tuple(map(layout.unpack, states)) or None,
        )

    def predict(
        self,
        encoded_texts: Iterable[Mapping[str, Any]] | Mapping[str, Any],
        speed: float | Iterable[float] | None = None,
        min_exit_layer: int | None = None,
        max_layers: int | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        regroup: bool = True,
    ) -> Iterator[Answer]:
        """
        Answers texts of any number in their order, fast without a batch size: texts of similar length share a packed
        batch, and those that go on share one with those of other batches. The model must be in eval mode.

        Args:
            encoded_texts (iterable of `Mapping`, or `Mapping` of lists):
                `input_ids` and what else the tokenizer gave to each text, as lists without padding: what
                `tokenizer(texts)` returns, rows of a `datasets` data set, or a stream of such. A stream is read
                up to 16 batches ahead.
            speed (`float` or iterable of `float`, *optional*): In [0, 1], for all or one for each; 0 unless given.
            min_exit_layer (`int`, *optional*): As in `forward`.
            max_layers (`int`, *optional*): As in `forward`.
            batch_size (`int`, *optional*):
                Reads and answers so many texts at a time, 1 for each as it comes. By the number of tokens unless
                given, which is faster.
            batch_tokens (`int`, *optional*):
                Tokens of a packed batch, about: 1,024 on a CPU and 16,384 on an accelerator unless given.
            regroup (`bool`): Whether texts that go on may be joined to those of other batches.

        Returns:
            An iterator over one [`Answer`] for each text. A text that cannot be read or answered raises an error that
            names its position, after the answers of all texts before it; so does a stream that raises.

        Example:

        ```python
        >>> answers = model.predict(tokenizer(["first text", "second text"]), speed=0.5)
        >>> [(answer.logits.argmax().item(), answer.exit_layer) for answer in answers]
        [(1, 2), (0, 5)]
        ```
        """
        settings = PredictionSettings.of(self, batch_size, batch_tokens, regroup)
        exits = exit_range(self.config.num_hidden_layers, min_exit_layer, max_layers)
        texts = read_texts(encoded_texts, checked_speeds(speed), self.config.text_config)
        return predict(
            texts, lambda block, batch_tokens: answer_block(self, block, exits, settings, batch_tokens), settings
        )

    def answer_batch(self, texts: TextsInFlight, exits: range) -> list[Leaving]:
        """The answers of one packed batch. Arguments as in `run_layer_and_exit`."""
        answers = []
        for depth, layer in enumerate(self.fastbert.layers()[: exits[-1]], start=1):
            leaving, texts = self.run_layer_and_exit(depth, layer, texts, exits)
            answers += leaving
            if texts is None:
                break
        return answers

    def run_layer_and_exit(
        self, depth: int, layer: nn.Module, texts: TextsInFlight, exits: range
    ) -> tuple[list[Leaving], TextsInFlight | None]:
        """
        One layer, and its exit if a text could leave there.

        Args:
            depth (`int`): Number of the layer, from 1.
            layer (`nn.Module`): The layer.
            texts (`TextsInFlight`): What comes to the layer.
            exits (`range`): The layers whose exits may answer; the last one answers everything.

        Returns:
            `tuple`: the answers of those that leave, if any, and those that go on, `None` if none does.
        """
        texts = replace(texts, hidden_states=run_layer(layer, texts.hidden_states, texts.packed_batch))
        if depth not in exits or (depth < exits[-1] and not texts.speeds.any()):
            return [], texts
        logits = self._read_exit(depth, texts)
        uncertainty, state = exit_uncertainty(logits, self.config.exit_policy, self.config.patience, texts.state)
        rows = texts.packed_batch.rows
        if depth == exits[-1]:
            return [Leaving(rows, logits, uncertainty, depth)], None
        if state is not None:
            # What students say is nothing to rows at speed 0, whatever the other rows ask for.
            state = state.masked_fill((texts.speeds == 0).to(state.device)[:, None], -1)
        texts = replace(texts, state=state)
        # The one wait for the device in each layer: how many rows go on decides the shapes of the next.
        done = uncertainty.cpu() < texts.speeds
        if done.all():
            return [Leaving(rows, logits, uncertainty, depth)], None
        if not done.any():
            return [], texts
        # Indices made on the CPU: a boolean mask on the device would wait for it again.
        leaving = done.nonzero()[:, 0].to(logits.device)
        return [Leaving(rows[done], logits[leaving], uncertainty[leaving], depth)], texts.keep(~done)

    def _read_exit(self, depth: int, texts: TextsInFlight) -> torch.Tensor:
        readable = self.fastbert.final_norm(texts.hidden_states)
        return self.exits[depth - 1](readable, texts.packed_batch, self.shared_pooler)  # [texts, num_labels]

    def _run_every_layer(
        self, texts: TextsInFlight, every_exit: bool, keep_states: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The packed logits of every exit, or of the last one alone, and the packed states of every layer, if kept."""
        exit_logits, states = [], [texts.hidden_states]
        for depth, layer in enumerate(self.fastbert.layers(), start=1):
            texts = replace(texts, hidden_states=run_layer(layer, texts.hidden_states, texts.packed_batch))
            if every_exit or depth == len(self.exits):
                exit_logits.append(self._read_exit(depth, texts))
            if keep_states:
                states.append(texts.hidden_states)
        if not keep_states:
            return exit_logits, []
        states[-1] = self.fastbert.final_norm(states[-1])
        return exit_logits, states


__all__ = ["FastBertForSequenceClassification", "FastBertModel"]

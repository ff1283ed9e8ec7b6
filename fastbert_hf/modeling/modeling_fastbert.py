"""FastBertModel, a stock encoder run on packed batches, and FastBertForSequenceClassification, with its exits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from .answers import Answers, FastBertSequenceClassifierOutput
from .configuration_fastbert import FastBertConfig
from .encoder_layouts import (
    embed_tokens,
    encoder_layers,
    get_encoder_layout,
    packed_position_ids,
    rotary_embeddings,
    run_layer,
)
from .exit_classifiers import EXIT_POOLERS, ExitClassifier
from .exit_policies import check_max_layers, exit_uncertainty, row_speeds
from .packed_batch import PACKED_ATTENTION, PackedBatch, pack_batch
from .pretrained_fastbert import FastBertPreTrainedModel
from .stock_checkpoints import classifier_config, keep_first_layers, load_classifier, load_encoder, split_arguments


if TYPE_CHECKING:
    # Code beside weights is copied as far as its imports go, and the pipeline must go with it.
    from .pipeline_fastbert import FastTextClassificationPipeline  # noqa: F401


class FastBertModel(FastBertPreTrainedModel):
    """
    A stock encoder whose layers run on packed batches. Takes what the encoder takes and returns the same hidden
    states, with zeros at padding.

    Args:
        config ([`FastBertConfig`]): `config.text_config` is the encoder's.

    Example:

    ```python
    >>> from transformers import BertConfig
    >>> from fastbert_hf import FastBertConfig, FastBertModel

    >>> model = FastBertModel(FastBertConfig(text_config=BertConfig(num_hidden_layers=2))).eval()
    >>> model(input_ids=torch.tensor([[2, 7, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 768])
    ```
    """

    # AutoModel reads a classifier's checkpoint, too, and needs none of its exits.
    _keys_to_ignore_on_load_unexpected = [r"^exits\.", r"^shared_pooler\."]

    def __init__(self, config: FastBertConfig):
        super().__init__(config)
        layout = get_encoder_layout(config.text_config)
        # Chunks of the feed-forward layers must divide the number of tokens, which no packed batch can promise.
        config.text_config.chunk_size_feed_forward = 0
        arguments = {"add_pooling_layer": False} if layout.has_pooler else {}
        self.backbone = AutoModel.from_config(config.text_config, attn_implementation=PACKED_ATTENTION, **arguments)
        self.supports_gradient_checkpointing = self.backbone.supports_gradient_checkpointing
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.backbone.set_input_embeddings(value)

    def embed(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **inputs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, PackedBatch]:
        """
        Packs a padded batch and runs the embedding layer on it. Arguments as in `forward`.

        Returns:
            `tuple`: the embeddings, `[1, total_tokens, hidden_size]`, and the [`PackedBatch`].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if self.backbone.config._attn_implementation != PACKED_ATTENTION:
            raise ValueError(
                f"the backbone's attention was changed to {self.backbone.config._attn_implementation!r}, with which "
                "the texts of a batch would read each other. Choose the kernel on the model instead: "
                "model.set_attn_implementation('sdpa')"
            )
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens.dim() != (2 if input_ids is not None else 3):
            raise ValueError(
                f"input_ids must be [batch_size, sequence_length] (inputs_embeds one more), got {list(tokens.shape)}."
            )
        if attention_mask is None:
            attention_mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if attention_mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"attention_mask must be [batch_size, sequence_length] = {list(tokens.shape[:2])}, got "
                f"{list(attention_mask.shape)}."
            )
        packed_batch = pack_batch(attention_mask, self.config._attn_implementation)
        if position_ids is None:
            position_ids = packed_position_ids(self.backbone, packed_batch, input_ids)
        else:
            position_ids = packed_batch.pack(position_ids)
        inputs.update(input_ids=input_ids, inputs_embeds=inputs_embeds)
        packed_inputs = {name: packed_batch.pack(value) for name, value in inputs.items() if value is not None}
        hidden_states = embed_tokens(self.backbone, {**packed_inputs, "position_ids": position_ids})
        position_embeddings = rotary_embeddings(self.backbone, hidden_states, position_ids)
        return hidden_states, replace(packed_batch, position_embeddings=position_embeddings)

    def layers(self) -> list[nn.Module]:
        """The stock layer of every depth, first to last."""
        return encoder_layers(self.backbone)

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        What an exit or a caller reads of a layer's output: normalised, where the encoder does so once at its end.
        """
        name = get_encoder_layout(self.backbone.config).final_norm
        return hidden_states if name is None else self.backbone.get_submodule(name)(hidden_states)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        task_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """
        Args:
            input_ids (`torch.Tensor` of shape `[batch_size, sequence_length]`): Padded tokens, on either side.
            attention_mask (`torch.Tensor` of shape `[batch_size, sequence_length]`, *optional*):
                1 for tokens, 0 for padding. All are tokens unless given.
            token_type_ids (`torch.Tensor` of shape `[batch_size, sequence_length]`, *optional*):
                0 for the first text of a pair and 1 for the second.
            position_ids (`torch.Tensor` of shape `[batch_size, sequence_length]` or `[1, sequence_length]`,
                *optional*):
                Counted from each text's first token, as its family does, unless given.
            inputs_embeds (`torch.Tensor` of shape `[batch_size, sequence_length, embedding_size]`, *optional*):
                In place of `input_ids`.
            task_type_ids (`torch.Tensor` of shape `[batch_size, sequence_length]`, *optional*): For ERNIE.
            output_hidden_states (`bool`, *optional*): Whether to return the output of every layer.
            output_attentions (`bool`, *optional*): Not available; `True` is an error.

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `[batch_size, sequence_length, hidden_size]`, zero at
            padding.
        """
        refuse_attentions(self.config, output_attentions)
        hidden_states, packed_batch = self.embed(
            input_ids,
            attention_mask,
            inputs_embeds,
            position_ids,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
        )
        states = [hidden_states]
        for layer in self.layers():
            states.append(run_layer(layer, states[-1], packed_batch))
        states[-1] = self.final_norm(states[-1])
        keeps_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutput(
            last_hidden_state=packed_batch.unpack(states[-1]),
            hidden_states=tuple(map(packed_batch.unpack, states)) if keeps_states else None,
        )


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
        hidden_states, packed_batch = self.fastbert.embed(
            input_ids,
            attention_mask,
            inputs_embeds,
            position_ids,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
        )
        speeds = row_speeds(speed, packed_batch.padded_shape[0])
        check_max_layers(max_layers, self.config.num_hidden_layers)
        if (output_exit_logits or output_hidden_states) and (speeds.any() or max_layers is not None):
            raise ValueError(
                "output_exit_logits and output_hidden_states need every layer of every row: leave out speed and "
                "max_layers."
            )
        speeds = speeds[packed_batch.rows]
        last_layer = max_layers or self.config.num_hidden_layers
        all_hidden_states = [packed_batch.unpack(hidden_states)] if output_hidden_states else []
        all_exit_logits, answers, state = [], Answers(), None

        for depth, layer in enumerate(self.fastbert.layers()[:last_layer], start=1):
            hidden_states = run_layer(layer, hidden_states, packed_batch)
            if output_hidden_states and depth < last_layer:
                all_hidden_states.append(packed_batch.unpack(hidden_states))
            if depth < last_layer and not output_exit_logits and not speeds.any():
                continue
            readable = self.fastbert.final_norm(hidden_states)
            logits = self.exits[depth - 1](readable, packed_batch, self.shared_pooler)  # [texts, num_labels]
            uncertainty, state = exit_uncertainty(logits, self.config.exit_policy, self.config.patience, state)
            if state is not None:
                # What students say is nothing to rows at speed 0, whatever the other rows ask for.
                state = state.masked_fill((speeds == 0).to(state.device)[:, None], -1)
            if output_exit_logits:
                all_exit_logits.append(logits)
            if depth == last_layer:
                answers.add(packed_batch.rows, logits, uncertainty, depth)
                break
            if not speeds.any():
                continue
            # The one wait for the device in each layer: how many rows go on decides the shapes of the next.
            done = uncertainty.cpu() < speeds
            if done.any():
                # Indices made on the CPU: a boolean mask on the device would wait for it again.
                leaving = done.nonzero()[:, 0].to(logits.device)
                answers.add(packed_batch.rows[done], logits[leaving], uncertainty[leaving], depth)
                if done.all():
                    break
                packed_batch, hidden_states = packed_batch.keep(~done, hidden_states)
                speeds = speeds[~done]
                state = state if state is None else state[(~done).nonzero()[:, 0].to(logits.device)]

        if output_hidden_states:
            all_hidden_states.append(packed_batch.unpack(readable))
        order, logits, uncertainty, exit_layer = answers.in_order()
        if not self.training and uncertainty.isnan().any():
            raise ValueError(
                f"the logits of rows {uncertainty.isnan().nonzero()[:, 0].tolist()} are not finite, so there is no "
                "answer: check the model's weights and inputs for NaN and infinity."
            )
        if labels is not None and not labels.is_floating_point():
            labels = labels.view(-1)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return FastBertSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            exit_layer=exit_layer,
            uncertainty=uncertainty,
            exit_logits=torch.stack(all_exit_logits, 1)[order] if output_exit_logits else None,
            hidden_states=tuple(all_hidden_states) or None,
        )


def refuse_attentions(config: FastBertConfig, output_attentions: bool | None) -> None:
    """Attention maps of a packed batch are never formed, so asking for them is an error."""
    if config.output_attentions if output_attentions is None else output_attentions:
        raise ValueError(
            "output_attentions is not available: packed batches never form the attention maps. Leave it out."
        )


__all__ = ["FastBertForSequenceClassification", "FastBertModel"]

"""The FastBERT models: for texts, for tokens, and for answers in a passage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.utils.generic import can_return_tuple

from .configuration_fastbert import FastBertConfig
from .fastbert_classifier import FastBertClassifier
from .modeling_outputs import FastBertQuestionAnsweringOutput
from .packed_encoder import FastBertModel


if TYPE_CHECKING:
    # Code beside weights is copied as far as its imports go, and the pipeline must go with it.
    from .pipeline_fastbert import FastTextClassificationPipeline  # noqa: F401
    from .pipeline_question_answering import FastQuestionAnsweringPipeline  # noqa: F401
    from .pipeline_token_classification import FastTokenClassificationPipeline  # noqa: F401


class FastBertForSequenceClassification(FastBertClassifier):
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

    task = "text-classification"


class FastBertForTokenClassification(FastBertClassifier):
    """
    A stock encoder with a classifier after every layer, which labels the tokens of each text with as many layers as
    that text needs: it leaves where the least certain of its tokens is sure (Li et al., ACL 2021: sentence-level
    exits). Everything else is as in [`FastBertForSequenceClassification`], with logits `[batch_size, sequence_length,
    num_labels]`, -100 at padding, and predictions of `[tokens, num_labels]`.

    Args:
        config ([`FastBertConfig`]): The model's config, with `task="token-classification"`.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from fastbert_hf import FastBertForTokenClassification

    >>> model = FastBertForTokenClassification.from_classifier("org/my-finetuned-ner")
    >>> tokenizer = AutoTokenizer.from_pretrained("org/my-finetuned-ner")
    >>> output = model(**tokenizer(["Ada lives in Turin."], return_tensors="pt"), speed=0.2)
    >>> output.logits.argmax(-1), output.exit_layer
    ```
    """

    task = "token-classification"


class FastBertForQuestionAnswering(FastBertClassifier):
    """
    A stock encoder with an exit after every layer that tells where the answer to a question is in a passage. A text
    leaves when the exit is sure of both ends: its uncertainty is the greater of theirs. Everything else is as in
    [`FastBertForSequenceClassification`]; predictions are `[tokens, 2]`.

    Args:
        config ([`FastBertConfig`]): The model's config, with `task="question-answering"`.

    Example:

    ```python
    >>> from fastbert_hf import FastBertForQuestionAnswering

    >>> model = FastBertForQuestionAnswering.from_classifier("org/my-finetuned-squad")
    >>> output = model(**tokenizer("Who?", "Ada did it.", return_tensors="pt"), speed=0.2)
    >>> output.start_logits.argmax(-1), output.end_logits.argmax(-1), output.exit_layer
    ```
    """

    task = "question-answering"

    def __init__(self, config: FastBertConfig):
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"an answer has two ends, and num_labels={config.num_labels}: leave out num_labels.")

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> FastBertQuestionAnsweringOutput:
        """
        Answer a padded batch. The other arguments are those of [`FastBertForSequenceClassification.forward`].

        Args:
            start_positions, end_positions (`torch.Tensor` of shape `[batch_size]`, *optional*):
                The first and the last token of each answer, for the loss.
            labels (`torch.Tensor` of shape `[batch_size, 2]`, *optional*): Both in one.

        Returns:
            [`FastBertQuestionAnsweringOutput`]
        """
        if start_positions is not None and end_positions is not None:
            labels = torch.stack([start_positions.view(-1), end_positions.view(-1)], -1)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        outputs = super().forward(**inputs, labels=labels, return_dict=True, **kwargs)
        start_logits, end_logits = outputs.logits.unbind(-1)
        rest = {name: value for name, value in outputs.items() if name != "logits"}
        return FastBertQuestionAnsweringOutput(start_logits=start_logits, end_logits=end_logits, **rest)


CLASSIFIERS: dict[str, type[FastBertClassifier]] = {
    classifier.task: classifier
    for classifier in (
        FastBertForSequenceClassification,
        FastBertForTokenClassification,
        FastBertForQuestionAnswering,
    )
}

__all__ = [*sorted(classifier.__name__ for classifier in CLASSIFIERS.values()), "FastBertModel"]

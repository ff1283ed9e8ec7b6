"""FeedForwardConversion: the stage that makes feed-forward layers fast and repairs what that costs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from .backbone_distillation_trainer import BackboneDistillationArguments, BackboneDistillationTrainer
from .feed_forward_conversion import check_shares, convert_feed_forward
from .stages import Stage


@dataclass(frozen=True)
class FeedForwardConversion(Stage):
    """
    Convert the feed-forward layers of a fine-tuned model ([`convert_feed_forward`]), and teach it to give again what
    it gave before ([`BackboneDistillationTrainer`]). No labels are needed. The students come after it:
    [`ExitTraining`].

    Args:
        learning_rate, num_train_epochs (`float`): As in every stage.
        share (`float`), depth (`int`), master_share (`float`, *optional*): As in [`convert_feed_forward`].

    Example:

    ```python
    >>> stages = [FeedForwardConversion(share=0.25), ExitTraining()]
    >>> trained = train("org/my-finetuned-bert", texts, stages=stages, output_dir="outputs/fast")
    ```
    """

    learning_rate: float = 5e-5
    num_train_epochs: float = 2.0
    share: float = 0.125
    depth: int | None = None
    master_share: float | None = None

    trainer_class = BackboneDistillationTrainer
    arguments_class = BackboneDistillationArguments
    name = "feed_forward_conversion"
    metrics = "loss"
    needs_labels = False
    needs_teacher = True

    def __post_init__(self):
        super().__post_init__()
        check_shares(self.share, self.master_share)

    def make_trainer(self, output_dir, model, train_dataset, eval_dataset, tokenizer, **training_arguments):
        arguments = self.make_arguments(output_dir, eval_dataset is not None, **training_arguments)
        dense = copy.deepcopy(model)
        convert_feed_forward(
            model,
            train_dataset,
            share=self.share,
            depth=self.depth,
            master_share=self.master_share,
            seed=arguments.seed,
            progress=not arguments.disable_tqdm and arguments.process_index == 0,
        )
        return self.trainer_class(
            model,
            arguments,
            teacher=dense,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )

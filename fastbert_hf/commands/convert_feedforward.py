"""
Convert the feed-forward layers of a fine-tuned classifier so that each token meets a share of the neurons, repair what
that costs by distillation, and teach its exits. Texts without labels are enough.

Any classifier of a supported family will do, or a FastBERT model. Without options it converts the model that comes
with the package on the texts of examples/data, to try it. An interrupted run goes on when it is started again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .conversion import ConversionOptions, convert
from .options import parse_options


if TYPE_CHECKING:
    from ..training.stages import Stage


@dataclass
class ConvertFeedforwardOptions(ConversionOptions):
    """Which model on which texts, and how."""

    output_dir: str = field(default="outputs/fast_feedforward", metadata={"help": "Folder of the finished model."})
    share: float = field(default=0.25, metadata={"help": "Part of the neurons that a token meets, in (0, 1]."})
    depth: int | None = field(
        default=None,
        metadata={
            "help": "Levels of decisions to 2 ** depth leaves; unless given, they hold as many neurons as before."
        },
    )
    master_share: float | None = field(
        default=None,
        metadata={"help": "Part of the neurons that every token meets; half of the share at two leaves unless given."},
    )

    def stage(self) -> Stage:
        """Return what changes the backbone."""
        from ..training import FeedForwardConversion

        return FeedForwardConversion(
            self.learning_rate, self.num_train_epochs, self.share, self.depth, self.master_share
        )


def main(arguments: list[str] | None = None, example_data: Path | None = None) -> None:
    """
    Run the command.

    Args:
        arguments (`list[str]`, *optional*): The words of a command line; those of the program unless given.
        example_data (`Path`, *optional*): Folder of `train.tsv` and `test.tsv`, where no data is given.
    """
    options = parse_options(ConvertFeedforwardOptions, __doc__, arguments)
    convert(options, options.stage, example_data)


if __name__ == "__main__":
    main()

"""
Make the texts of a fine-tuned classifier shorter on their way through the layers: tokens that receive little attention
are merged (FCA-BERT) or dropped (PoWER-BERT). What that costs is repaired by distillation, for which texts without
labels are enough, and the exits are taught on top.

Any classifier of a supported family will do, or a FastBERT model. Without options it takes the model that comes with
the package and the texts of examples/data, to try it. An interrupted run goes on when it is started again.
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
class CoarseningOptions(ConversionOptions):
    """Which model on which texts, and how."""

    output_dir: str = field(default="outputs/coarsening", metadata={"help": "Folder of the finished model."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the repair of the layers."})
    target: float = field(default=0.5, metadata={"help": "Part of the tokens of all layers that is left, in (0, 1]."})
    layers: list[int] | None = field(
        default=None, metadata={"help": "Those that make texts shorter, from 1; every second one unless given."}
    )
    merge: str = field(default="mean", metadata={"help": "mean, weighted (by attention received) or drop."})
    clusters: int = field(default=1, metadata={"help": "Coarse tokens of a text."})
    search: bool = field(
        default=False, metadata={"help": "Search on the texts how many tokens each layer needs, for this target."}
    )
    speed: float = field(
        default=0.0, metadata={"help": "At which the model will be used, for the search; its exits must be trained."}
    )
    retraining: str = field(
        default="distillation", metadata={"help": "distillation from the model itself, or labels, as in the papers."}
    )

    def stage(self) -> Stage:
        """Return what changes the backbone."""
        from ..training import TokenCoarsening

        names = (
            "learning_rate",
            "num_train_epochs",
            "target",
            "layers",
            "merge",
            "clusters",
            "search",
            "speed",
            "retraining",
        )
        return TokenCoarsening(**{name: getattr(self, name) for name in names})


def main(arguments: list[str] | None = None, example_data: Path | None = None) -> None:
    """
    Run the command.

    Args:
        arguments (`list[str]`, *optional*): The words of a command line; those of the program unless given.
        example_data (`Path`, *optional*): Folder of `train.tsv` and `test.tsv`, where no data is given.
    """
    options = parse_options(CoarseningOptions, __doc__, arguments)
    convert(options, options.stage, example_data)


if __name__ == "__main__":
    main()

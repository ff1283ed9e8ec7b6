"""
Convert the feed-forward layers of a fine-tuned classifier so that each token meets a share of the neurons, and teach
its exits. Texts without labels are enough.

    python examples/convert_feedforward.py  # the model that comes with the package, to try it

    python examples/convert_feedforward.py --model_name_or_path org/my-finetuned-bert --train_file texts.csv \\
        --validation_file dev.csv --share 0.125 --output_dir outputs/fast
"""

from pathlib import Path

from fastbert_hf.commands.convert_feedforward import main


if __name__ == "__main__":
    main(example_data=Path(__file__).parent / "data")

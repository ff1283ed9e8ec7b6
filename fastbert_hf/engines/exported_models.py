"""Models that other engines run: loaded from the folder that `export` wrote, used as any other."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..modeling.configuration_fastbert import FastBertConfig
from ..modeling.modeling_fastbert import FastBertForSequenceClassification
from ..modeling.stock_checkpoints import DOWNLOAD_ARGUMENTS
from .backends import BACKENDS, import_engine
from .export_folder import READER, ExportFolder, check_folder_is_free, whole_folder
from .exported_engine import ExportedEngine, Graphs


# What is downloaded of a repository.
OF_AN_EXPORT = (
    "*.json",
    "*.txt",
    "*.model",
    READER,
    *(f"*{end}" for own in BACKENDS.values() for end in own.suffixes),
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "README.md")
# Fields of a config that can be given when a model is loaded.
FIELDS = {*FastBertConfig.__dataclass_fields__, "num_labels", "id2label", "label2id"} - {"dtype"}
# What Transformers takes, and has no meaning for graphs.
WITHOUT_MEANING = ("trust_remote_code", "device_map", "low_cpu_mem_usage", "use_safetensors", "weights_only")
WITHOUT_MEANING += ("adapter_kwargs", "quantization_config", "attn_implementation", "variant", "use_kernels")
NOTHING_WRONG = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


class ExportedConfig(FastBertConfig):
    """What the configs of exported models share."""

    @classmethod
    def of(cls, config: FastBertConfig) -> Self:
        """Return the config of the exported form of a model."""
        return cls.from_dict({**config.to_dict(), "model_type": cls.model_type, "architectures": None})


@strict
class FastBertOnnxConfig(ExportedConfig):
    """Configuration of a [`FastBertOnnx`]: that of the model it was made of."""

    model_type = "fastbert_onnx"


@strict
class FastBertOpenVinoConfig(ExportedConfig):
    """Configuration of a [`FastBertOpenVino`]: that of the model it was made of."""

    model_type = "fastbert_openvino"


class ExportedModel(FastBertForSequenceClassification):
    """
    A model whose embeddings, layers and exits another engine runs. All that answers is that of
    [`FastBertForSequenceClassification`]; its own weights are on `meta` and tell shapes alone, so it cannot learn.
    """

    def __init__(self, config: FastBertConfig, graphs: Graphs):
        with torch.device("meta"):
            super().__init__(config)
        self.graphs = graphs
        torch.nn.Module.train(self, False)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, num_threads: int | None = None, **kwargs: Any
    ) -> Self:
        """
        Load what [`export`] wrote. Every file is read once, to see that it is whole.

        Args:
            pretrained_model_name_or_path (`str` or `PathLike`): A folder, or the id of a repository.
            num_threads (`int`, *optional*): Threads of a call; as many as PyTorch uses unless given.
            kwargs: `config`, and where the files of a repository are: `revision`, `token`, `cache_dir`, ...

        Raises:
            ValueError: If the folder is another one, half written, or broken.
            ImportError: If the engine is not installed.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        if dtype not in (None, "auto", "float32", torch.float32):
            raise ValueError(f"dtype={dtype}: an exported model answers in float32. Leave it out.")
        if kwargs.get("device_map") not in (None, "cpu", {"": "cpu"}):
            raise ValueError(
                f"device_map={kwargs['device_map']!r:.40}: an exported model runs on the CPU. Leave it out."
            )
        wants_info, config = kwargs.pop("output_loading_info", False), kwargs.pop("config", None)
        download = {name: kwargs.pop(name) for name in DOWNLOAD_ARGUMENTS if name in kwargs}
        fields = {name: kwargs.pop(name) for name in FIELDS & kwargs.keys()}
        unknown = [name for name in kwargs if name not in WITHOUT_MEANING and not name.startswith("_")]
        if unknown:
            raise TypeError(f"{cls.__name__}.from_pretrained does not know {', '.join(unknown)}: leave it out.")
        folder = folder_of(pretrained_model_name_or_path, download)
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(folder if config is None else config, **fields)
        elif config.model_type != cls.config_class.model_type:
            raise ValueError(
                f"config is of type {config.model_type!r}, not {cls.config_class.model_type!r}: leave it out."
            )
        found = ExportFolder.read(folder, config)
        if found.backend != cls.engine_name:
            raise ValueError(
                f"{folder} was written for {found.backend!r}, and {cls.__name__} runs {cls.engine_name!r}: load it "
                f"with {EXPORTED_MODELS[found.backend].__name__}.from_pretrained, or with AutoModel."
            )
        import_engine(BACKENDS[found.backend], BACKENDS[found.backend].package)
        config.name_or_path = str(folder)
        threads = torch.get_num_threads() if num_threads is None else check_threads(num_threads)
        model = cls(config, Graphs(folder, found, threads, config.hidden_size))
        return (model, {name: set() for name in NOTHING_WRONG}) if wants_info else model

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def engine(self, inference: bool = False, retention: float | None = None) -> ExportedEngine:
        """Return what runs the graphs."""
        self.check_retention(retention)
        return ExportedEngine(self.graphs, self.fastbert.backbone)

    def weights_digest(self, whole: bool = False) -> str:
        """Return the digest of the weights that were exported; a `whole` one is that of all files."""
        return self.graphs.found.digest if whole else self.graphs.found.weights

    def checked_thresholds(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Return thresholds as they are: what students learnt from was checked when the model was exported."""
        return thresholds

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        Copy what the model was loaded from, graphs and tokenizer, with the config as it is now. As ever, nothing of an
        older export is lost before all of the new one is written.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub=True is not for an exported model: model.push_to_hub(repo_id)")
        target, found, source = Path(save_directory).resolve(), self.graphs.found, self.graphs.folder
        check_folder_is_free(target)
        names = {*found.files, *(name for name in TOKENIZER_FILES if (source / name).is_file())}
        names |= {READER} & {file.name for file in source.iterdir()}
        with whole_folder(target) as part:
            for name in names:
                shutil.copyfile(source / name, part / name)
            for graph in found.names:
                found.contents(part, graph)  # nothing has changed there meanwhile
            self.config.save_pretrained(part)
            found.write(part)

    def train(self, mode: bool = True) -> Self:
        """Raise a `ValueError` if the model is to be trained."""
        if mode:
            raise cannot("learn")
        return self

    def use_int8_layers(self, modules_to_not_convert: list[str] | None = None) -> list[str]:
        """Raise a `ValueError`: it is said when the model is exported."""
        raise cannot('change its precision: export(model, folder, quantize="int8"). It cannot be changed')

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        # What a move or a cast makes of a number says where to and into what.
        moved = fn(torch.zeros(1))
        if moved.device.type != "cpu" or moved.dtype is not torch.float32:
            raise cannot("be moved or cast")
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the model, if it is to stay on the CPU and in float32."""
        return self._apply(lambda value: value.to(*args, **kwargs))


class FastBertOnnx(ExportedModel):
    """A model that ONNX Runtime runs, from the folder that [`export`] wrote with `backend="onnx"`."""

    config_class, engine_name = FastBertOnnxConfig, "onnx"


class FastBertOpenVino(ExportedModel):
    """A model that OpenVINO runs, from the folder that [`export`] wrote with `backend="openvino"`."""

    config_class, engine_name = FastBertOpenVinoConfig, "openvino"


EXPORTED_MODELS = {own.engine_name: own for own in (FastBertOnnx, FastBertOpenVino)}


def cannot(what: str) -> ValueError:
    """Return the error of what only a model of PyTorch can do."""
    return ValueError(f"an exported model cannot {what}: use the one that it was made of.")


def check_threads(num_threads: Any) -> int:
    """Return a number of threads, or raise a `ValueError`."""
    if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1:
        raise ValueError(f"num_threads must be a whole number of at least 1, or None, got {num_threads!r:.40}.")
    return num_threads


def folder_of(name_or_path: str | os.PathLike, download: dict[str, Any]) -> Path:
    """Return the folder of an exported model, downloaded where it is on the Hub."""
    subfolder = download.get("subfolder") or ""
    if os.path.isdir(name_or_path):
        return Path(name_or_path).absolute() / subfolder
    if os.path.isabs(name_or_path) or str(name_or_path).startswith(".") or str(name_or_path).count("/") > 1:
        raise OSError(f"there is no folder {name_or_path}: give one that fastbert_hf.export wrote, or a repository.")
    names = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    known = {name: download[name] for name in names if download.get(name) is not None}
    patterns = [str(Path(subfolder, pattern)) for pattern in OF_AN_EXPORT]
    return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **known)) / subfolder

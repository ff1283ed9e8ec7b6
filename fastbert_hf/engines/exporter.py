"""Write a model as graphs for ONNX Runtime or OpenVINO: embeddings, some layers at a time, and every exit."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..modeling.families import max_text_tokens, rotary_types
from ..modeling.fastbert_classifier import FastBertClassifier
from ..modeling.int8_layers import has_int8_layers
from ..modeling.int8_products import LEVELS
from ..modeling.modeling_fastbert import FastBertForSequenceClassification
from ..modeling.packed_batch import pack_lists
from ..modeling.processing_cascade import check_tokenizer, find_tokenizer
from ..rows import encoded_rows
from .backends import BACKENDS, OPSET, Backend, check_backend, import_engine
from .export_folder import (
    EMBEDDINGS,
    PROBE,
    QUANTIZED,
    READER,
    ExportFolder,
    check_folder_is_free,
    exit_name,
    file_digest,
    layers_name,
    model_of,
    reading_of,
    whole_folder,
)
from .exported_models import EXPORTED_MODELS
from .graph_modules import EmbeddingsGraph, ExitGraph, LayersGraph, Levels, ProbeGraph, put_graph_layers
from .static_scales import put_static_scales


# Of the texts that graphs are traced with; no two numbers of a shape are equal, so that none is taken for another.
TRACED_LENGTHS = (5, 7, 9)
# The exporter of PyTorch changes what all threads of a process see.
EXPORTING = threading.Lock()
# Of the texts that graphs are checked with, and how far answers may be from the model's.
CHECKED_LENGTHS = (3, 12, 12, 40)
MOST_DIFFERENCE, MOST_IN_INT8 = 1e-3, 0.5


def export(
    model: FastBertForSequenceClassification,
    folder: str | os.PathLike,
    backend: str = "onnx",
    quantize: str | None = None,
    layers_per_stage: int = 1,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration_texts: Sequence[Any] | None = None,
    progress: bool = True,
) -> Path:
    """
    Write a model as graphs for another engine: its embeddings, its layers, some at a time, and each exit. Between
    them texts that have an answer are left out, so that early exit saves as much as in PyTorch.

    Args:
        model ([`FastBertForSequenceClassification`]):
            In float32, half precision, which becomes float32, or with int8 layers. It is left alone.
        folder (`str` or `PathLike`):
            Where it goes, with its config and tokenizer: for `pipeline("fast-text-classification", model=folder)`,
            and with `backend="onnx"` also for `fastbert_reader.py`, which is written there and needs no torch.
        backend (`str`): `"onnx"` for ONNX Runtime, `"openvino"` for OpenVINO.
        quantize (`str`, *optional*):
            `"int8"` rounds weights and tokens as [`use_int8_layers`] does, each token with scales of its own. A model
            that has int8 layers keeps them.
        layers_per_stage (`int`):
            Layers of a graph. With more than one, texts that leave inside of it are run to its end; their answers and
            exit layers are the same.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The model's own, if it knows one, unless given.
        calibration_texts (sequence of `str` or `dict`, *optional*):
            For OpenVINO in int8: some hundred texts like those that will be answered, or rows with `text` and
            `text_pair`. Tokens are then rounded with scales that are fixed by what the layers read of these texts,
            which is faster, after SmoothQuant has moved large values into the weights. Needs NNCF.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `Path`: The folder. No other thread should use PyTorch meanwhile: its exporter changes what they see.

    Raises:
        ImportError: If the backend is not installed.
        ValueError: If the model cannot be exported: one whose texts become shorter, with fast feed-forward layers,
            or a cascade.

    Example:

    ```python
    >>> model = FastBertForSequenceClassification.from_pretrained("org/fastbert-chnsenticorp")
    >>> fastbert_hf.export(model, "outputs/onnx", quantize="int8")
    >>> pipeline("fast-text-classification", model="outputs/onnx")("I would go there again.", speed=0.5)
    ```
    """
    engine, folder = check_backend(backend), Path(folder).resolve()
    import_engine(engine, engine.package, "onnx", "onnxscript")
    check_model(model, quantize, layers_per_stage)
    check_folder_is_free(folder)
    tokenizer = find_tokenizer(model) if tokenizer is None else tokenizer
    check_tokenizer(model, tokenizer)
    model.checked_thresholds(torch.ones(1, model.config.num_hidden_layers))  # students of another teacher
    weights = model.weights_digest()
    if calibration_texts is not None:
        check_calibration_texts(model, calibration_texts, backend, quantize)
        import_engine(engine, "nncf")
    model, config = copy.deepcopy(model).eval().cpu(), copy.deepcopy(model.config)
    if quantize is not None and not has_int8_layers(model):
        # Layers with fixed scales are rounded as graphs.
        kept = None if calibration_texts is None else linear_layers(model)
        model.float().use_int8_layers(kept)
        weights = model.weights_digest()
    quantize = "int8" if has_int8_layers(model) else None
    nn.Module.float(model)  # Transformers' own refuses int8 weights, which are not touched
    of_model = EXPORTED_MODELS[backend]
    config.quantization_config = None
    with EXPORTING, whole_folder(folder) as part:
        with quiet():
            files = write_graphs(copy.deepcopy(model), engine, part, layers_per_stage, quantize, progress)
        of_model.config_class.of(config).save_pretrained(part)
        tokenizer.save_pretrained(part)
        if backend == "onnx":
            shutil.copyfile(Path(__file__).with_name(READER), part / READER)
        ExportFolder(
            model=model_of(config),
            backend=backend,
            quantize=quantize,
            layers_per_stage=layers_per_stage,
            reading=reading_of(AutoTokenizer.from_pretrained(part)),  # not all that was set is saved
            weights=weights,
            files=files,
        ).write(part)
        if calibration_texts is not None:
            rows = encoded_rows(list(calibration_texts), tokenizer, max_text_tokens(config.text_config))
            put_static_scales(of_model.from_pretrained(part), rows, progress)
        check_graphs(model, of_model.from_pretrained(part))
    return folder


def check_model(model: Any, quantize: Any, layers_per_stage: Any) -> None:
    """Raise a `ValueError` unless a model can be exported so."""
    if isinstance(model, FastBertClassifier) and not isinstance(model, FastBertForSequenceClassification):
        raise ValueError(
            f"{type(model).__name__} cannot be exported: graphs answer for whole texts, and this model for tokens. It "
            "runs with PyTorch; model.use_int8_layers() makes it faster."
        )
    if not isinstance(model, FastBertForSequenceClassification) or model.engine_name != "torch":
        raise ValueError(
            f"export takes a FastBertForSequenceClassification, got {type(model).__name__}: export each member of a "
            "cascade, and merge adapters first."
        )
    if quantize not in QUANTIZED:
        raise ValueError(f"quantize={quantize!r:.40} is not known; choose one of None, 'int8'.")
    is_number = isinstance(layers_per_stage, int) and not isinstance(layers_per_stage, bool)
    if not is_number or not 1 <= layers_per_stage <= model.config.num_hidden_layers:
        raise ValueError(
            f"layers_per_stage must be from 1 to {model.config.num_hidden_layers} (the layers of this model), got "
            f"{layers_per_stage!r:.40}."
        )
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise ValueError("the model has weights that are NaN or infinite, so it answers nothing: train it again.")
    for name in ("coarsening", "feed_forward"):
        if getattr(model.config, name) is not None:
            raise ValueError(
                f"a model with config.{name} cannot be exported: such layers are computed with PyTorch alone."
            )


def check_calibration_texts(
    model: FastBertForSequenceClassification, texts: Any, backend: str, quantize: str | None
) -> None:
    """Raise a `ValueError` unless scales can be fixed by these texts."""
    if backend != "openvino" or quantize != "int8" or has_int8_layers(model):
        raise ValueError(
            'calibration_texts are for a model in float32, with backend="openvino" and quantize="int8": leave them '
            "out, and each token has scales of its own."
        )
    is_list = isinstance(texts, Sequence) and not isinstance(texts, (str, bytes))
    if not is_list or not texts or not all(isinstance(text, (str, Mapping)) for text in texts):
        raise ValueError(
            f"calibration_texts must be a list of texts, some hundred of them, got {texts!r:.40}. Example: "
            'calibration_texts=["a text", "another one"]'
        )


def linear_layers(model: FastBertForSequenceClassification) -> list[str]:
    """Return the names of all linear layers."""
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]


def write_graphs(
    model: FastBertForSequenceClassification,
    backend: Backend,
    folder: Path,
    layers_per_stage: int,
    quantize: str | None,
    progress: bool,
) -> dict[str, str]:
    """Write every graph, and return the digest of each file."""
    levels, layers, depths = Levels(), model.fastbert.layers(), range(1, model.config.num_hidden_layers + 1)
    put_graph_layers(model, backend.int8_product, levels)
    embeddings, steps = EmbeddingsGraph(model.fastbert.backbone), torch.tensor(float(LEVELS[0]))
    traced = pack_lists([0, 1, 2], list(TRACED_LENGTHS), torch.device("cpu"))
    places, tokens, is_token = traced.padded_form
    of_tokens = {name: torch.zeros_like(traced.position_ids) for name in embeddings.inputs}
    hidden_states, *turns = embeddings(*of_tokens.values())
    of_layers = {"hidden_states": hidden_states, "places": places, "tokens": tokens, "is_token": is_token}
    of_layers |= {"levels": steps, **{f"rotary_{number}": turn for number, turn in enumerate(turns)}}
    of_exits = {"hidden_states": hidden_states, "places": places, "is_token": is_token}
    graphs = [(EMBEDDINGS, embeddings, of_tokens)]
    for first in depths[::layers_per_stage]:
        own = layers[first - 1 : first - 1 + layers_per_stage]
        graph = LayersGraph(model.fastbert.backbone, own, rotary_types(model.config.text_config), levels)
        graphs.append((layers_name(first, first + len(own) - 1), graph, of_layers))
    graphs += [(exit_name(depth), ExitGraph(model, depth), of_exits) for depth in depths]
    if quantize and backend.reads_levels:
        rows = torch.ones(1, 3, ProbeGraph.width)
        graphs.append((PROBE, ProbeGraph(backend.int8_product), {"hidden_states": rows, "levels": steps}))
    forms = [form_of(graph) for _, graph, _ in graphs]
    files, programs = {}, {}
    for form, (name, graph, inputs) in zip(forms, tqdm(graphs, desc="Exporting", disable=not progress), strict=True):
        if forms.count(form) == 1:
            program = program_of(graph, inputs)
        else:  # layers are alike, and making a program takes seconds
            program = programs[form] = programs.get(form) or program_of(with_random_weights(graph), inputs)
            fill(program.model, graph)
        backend.write(program, folder / name)
        files.update({name + suffix: file_digest(folder / (name + suffix)) for suffix in backend.suffixes})
    return files


def form_of(graph: nn.Module) -> tuple:
    """Return what tells whether the programs of two graphs differ in nothing but their weights."""
    settings = [
        (name, type(part), *sorted((key, value) for key, value in vars(part).items() if is_setting(key, value)))
        for name, part in graph.named_modules(remove_duplicate=False)
    ]
    return (*settings, *((name, value.shape, value.dtype) for name, value in graph.state_dict().items()))


def is_setting(name: str, value: Any) -> bool:
    """Tell whether an attribute of a module may change what it computes: its own number does not."""
    return name != "layer_idx" and not name.startswith("_") and isinstance(value, (bool, int, float, str, tuple))


def program_of(graph: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """Return the ONNX program of a graph, whose numbers of texts and tokens are free."""
    # All but the one row that a packed batch is, and the sizes of hidden states.
    free_sizes = tuple(
        {dim: torch.export.Dim.DYNAMIC for dim in range(min(value.dim(), 2)) if value.shape[dim] > 1}
        for value in inputs.values()
    )
    return torch.onnx.export(
        graph.eval(),
        tuple(inputs.values()),
        input_names=list(inputs),
        dynamic_shapes=(free_sizes,),
        opset_version=OPSET,
        dynamo=True,
        optimize=True,
        verbose=False,
    )


def with_random_weights(graph: nn.Module) -> nn.Module:
    """Return a copy of a graph none of whose weights are equal: the exporter makes one of those that are."""
    graph = copy.deepcopy(graph)
    for value in graph.state_dict().values():
        value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.randint(100, value.shape))
    return graph


def fill(program: Any, graph: nn.Module) -> None:
    """Put the weights of a graph into a program of its form."""
    (onnx_ir,) = import_engine(BACKENDS["onnx"], "onnx_ir")
    weights, found = graph.state_dict(), program.graph.initializers
    for name in found.keys() & weights.keys():
        found[name].const_value = onnx_ir.tensor(weights[name].contiguous().numpy(), name=name)


def check_graphs(model: FastBertForSequenceClassification, exported: FastBertForSequenceClassification) -> None:
    """Raise a `RuntimeError` unless graphs say of some random texts what the model says."""
    vocab_size, longest = model.config.vocab_size, max_text_tokens(model.config.text_config)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([min(length, longest) for length in CHECKED_LENGTHS])
    input_ids = torch.randint(vocab_size, (len(lengths), int(lengths.max())), generator=generator)
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    wanted, found = (own(input_ids, mask, output_exit_logits=True).exit_logits for own in (model, exported))
    # Int8 layers round what differs by an ulp to the next step.
    differs = (found - wanted).abs().max() / wanted.std().clamp(min=1e-6)
    if not differs < (MOST_DIFFERENCE if not has_int8_layers(model) else MOST_IN_INT8):
        raise RuntimeError(
            f"the graphs answer otherwise than the model (by {differs:.2g} of its logits' deviation): please report "
            "this with the model's config and the versions of torch and onnxscript."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the exporter says of operators that are not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""The engines that run an exported model: one row for each."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.onnx.ops import symbolic

from ..modeling.int8_products import SMALLEST_SCALE


# From what a graph takes, by name, to what it gives.
Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
# Of the ONNX operators: the newest that both engines run whole.
OPSET = 20


@dataclass(frozen=True)
class Backend:
    """
    One engine.

    Args:
        name (`str`): As `export` takes it, and certificates know it.
        package (`str`): What is imported for it, and how it is installed.
        suffixes (`tuple`): Of the files of one graph.
        write (`Callable`): From an ONNX model and a path without a suffix, which gets these files.
        load (`Callable`): From what these files hold, how many threads, and the hidden size, to what runs it.
        int8_product (`Callable`):
            From rows, `[rows, in_features]`, and a [`GraphInt8Linear`] to what that gives, in a graph.
        reads_levels (`bool`): Whether graphs are told to how many steps a token is rounded.
    """

    name: str
    package: str
    suffixes: tuple[str, ...]
    write: Callable[[Any, Path], None]
    load: Callable[[list[bytes], int, int], Run]
    int8_product: Callable
    reads_levels: bool


def import_engine(backend: Backend, *names: str) -> list[Any]:
    """
    Import what a backend needs.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return [import_module(name) for name in names]
    except ImportError as error:
        raise ImportError(
            f"backend={backend.name!r} needs {backend.package}, which cannot be imported ({error}): "
            f"pip install 'fastbert-hf[{backend.name}]'"
        ) from error


def _write_onnx(program: Any, path: Path) -> None:
    path.with_suffix(".onnx").write_bytes(program.model_proto.SerializeToString())


def _load_onnx(contents: list[bytes], num_threads: int, hidden_size: int) -> Run:
    (onnxruntime,) = import_engine(BACKENDS["onnx"], "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = 3
    # Each graph has threads of its own: those that wait for work must not take it from the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A graph has all of its weights in itself, and may name no other file.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    session = onnxruntime.InferenceSession(contents[0], options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda given: session.run(None, {name: given[name] for name in names})


def _int8_in_onnx(rows: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Round each token, multiply in whole numbers, and scale: as [`Int8Linear`] does, in fewer passes."""
    levels, shape = layer.levels.given, (rows.shape[0], layer.weight.shape[1])
    greatest, least = rows.amax(-1, keepdim=True).clamp(min=0), rows.amin(-1, keepdim=True).clamp(max=0)
    span = (greatest - least).clamp(min=SMALLEST_SCALE)  # [rows, 1], as all of these
    steps, scale = levels / span, span / levels
    below = (least * steps).round()  # the zero of a token, negative
    one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8)
    shifted = rows * steps - below
    rounded = symbolic("QuantizeLinear", (shifted, one, zero), dtype=torch.uint8, shape=rows.shape)
    given = rounded, layer.weight, one, layer.weight_scale, zero
    products = symbolic("com.microsoft::MatMulIntegerToFloat", given, dtype=torch.float32, shape=shape, version=1)
    # scale * (products + below * sums of weights) + bias: the last two are a product with two columns.
    columns = nn.functional.pad(below * scale, (0, 1), value=1.0)
    return symbolic("Gemm", (columns, layer.added, products * scale), dtype=torch.float32, shape=shape)


def _write_openvino(program: Any, path: Path) -> None:
    (openvino,) = import_engine(BACKENDS["openvino"], "openvino")
    model = openvino.Core().read_model(program.model_proto.SerializeToString())
    openvino.save_model(model, path.with_suffix(".xml"), compress_to_fp16=False)


def _load_openvino(contents: list[bytes], num_threads: int, hidden_size: int) -> Run:
    (openvino,) = import_engine(BACKENDS["openvino"], "openvino")
    settings = {
        "INFERENCE_NUM_THREADS": num_threads,
        "INFERENCE_PRECISION_HINT": "f32",
        # Of int8 layers: each token is rounded with a scale of its own for so many of its numbers.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": hidden_size if openvino_rounds_tokens() else 0,
    }
    core = openvino.Core()
    model = core.read_model(contents[0], openvino.Tensor(np.frombuffer(contents[1], np.uint8)))
    compiled = core.compile_model(model, "CPU", settings)
    names = [given.any_name for given in compiled.inputs]
    of_thread = threading.local()

    def run(given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if not hasattr(of_thread, "request"):
            of_thread.request = compiled.create_infer_request()
        outputs = of_thread.request.infer({name: given[name] for name in names}, share_inputs=True)
        return list(outputs.values())

    return run


@cache
def openvino_rounds_tokens() -> bool:
    """
    Tell whether OpenVINO multiplies rounded tokens rightly on this processor. Where oneDNN is held to AVX2, it fails,
    or gives NaN or nothing at all. It is tried on the products that overflow first, once in a process.
    """
    openvino, ops = import_engine(BACKENDS["openvino"], "openvino", "openvino.opset13")
    width, outputs = 256, 32
    weights = np.full((width, outputs), 127, np.int8)
    weights[:, 1::2] = -127
    rows = ops.parameter([-1, width], np.float32)
    whole = ops.multiply(ops.convert(ops.constant(weights), "f32"), ops.constant(np.ones((1, outputs), np.float32)))
    model = openvino.Model([ops.matmul(rows, whole, False, False)], [rows])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": width}
    # As many rows as a token has alone and as a batch has: other kernels may take them.
    given = [np.ones((number, width), np.float32) for number in (1, 64)]
    try:
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        found = [compiled(own)[0].copy() for own in given]
    except RuntimeError:  # there is no such kernel
        return False
    wanted = [own @ weights.astype(np.float32) for own in given]
    return all(
        own.shape == right.shape and np.allclose(own, right, rtol=1e-2)
        for own, right in zip(found, wanted, strict=True)
    )


def _int8_in_openvino(rows: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Leave the rounding to the engine, which rounds what such weights are multiplied with, token by token."""
    given, shape = (layer.weight, layer.weight_scale), tuple(layer.weight.shape)
    whole = symbolic("DequantizeLinear", given, {"axis": 1}, dtype=torch.float32, shape=shape)
    return rows @ whole + layer.bias


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("onnx", "onnxruntime", (".onnx",), _write_onnx, _load_onnx, _int8_in_onnx, True),
        Backend("openvino", "openvino", (".xml", ".bin"), _write_openvino, _load_openvino, _int8_in_openvino, False),
    )
}


def check_backend(name: str) -> Backend:
    """Return a backend by its name, or raise a `ValueError` that lists them."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend={name!r:.40} is not known; choose one of {', '.join(BACKENDS)}.")
    return BACKENDS[name]

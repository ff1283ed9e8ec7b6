"""
The engines of rivals.py. Each converter takes a case and returns what answers one padded batch, `run(input_ids,
attention_mask) -> logits`, all of them NumPy arrays, and notes. What an engine lacks it raises.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn


Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
INPUTS = ["input_ids", "attention_mask"]


def has_vnni() -> bool:
    """Return whether products of bytes are added in 32 bits. Where they are not, weights get seven bits."""
    return bool(torch.cpu._is_vnni_supported())


def torch_run(model: nn.Module) -> Run:
    """Return what answers a batch with a model of PyTorch."""

    @torch.inference_mode()
    def run(input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(input_ids), torch.from_numpy(attention_mask)
        return model(input_ids=batch[0], attention_mask=batch[1]).logits.float().numpy()

    return run


def torch_float32(case) -> tuple[Run, dict]:
    """Take the stock model as it is."""
    return torch_run(case.stock), {}


def torch_bfloat16(case) -> tuple[Run, dict]:
    """Take the stock model in half precision."""
    return torch_run(copy.deepcopy(case.stock).bfloat16()), {}


def torch_compiled(case) -> tuple[Run, dict]:
    """Compile the stock model, dynamic in both axes."""
    return torch_run(torch.compile(copy.deepcopy(case.stock), dynamic=True)), {}


def torch_dynamic_int8(case) -> tuple[Run, dict]:
    """Convert all linear layers: weights and activations with one scale for each matrix, at run time."""
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(case.stock), {nn.Linear}, dtype=torch.qint8)
    return torch_run(model), {"backend": torch.backends.quantized.engine}


def torchao_int8(case, compiled: bool = False) -> tuple[Run, dict]:
    """Convert all linear layers: a scale for each output and each token, at run time."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(case.stock)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch_run(torch.compile(model, dynamic=True) if compiled else model), {}


class _Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def exported(case) -> Path:
    """Export the stock model to ONNX with free batch and length, once for each case, and return the file."""
    if "onnx" not in case.converted:
        import onnx

        example = case.tokenizer(["Fine.", "A text of some more words.", "No."], padding=True, return_tensors="pt")
        path = case.folder / f"{case.name}.onnx"
        axes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=2, max=512)}
        torch.onnx.export(
            _Logits(copy.deepcopy(case.stock)).eval(),
            tuple(example[name] for name in INPUTS),
            path,
            dynamo=True,
            verbose=False,
            input_names=INPUTS,
            output_names=["logits"],
            dynamic_shapes={name: axes for name in INPUTS},
            external_data=False,
        )
        # The exporter leaves shapes there of weights that it transposed later, which the quantisers refuse.
        model = onnx.load(path)
        del model.graph.value_info[:]
        onnx.save(model, path)
        case.converted["onnx"] = path
    return case.converted["onnx"]


def onnxruntime_run(case, path: Path) -> Run:
    """Return what answers a batch with a file of ONNX."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda input_ids, attention_mask: session.run(
        None, {"input_ids": input_ids, "attention_mask": attention_mask}
    )[0]


def onnxruntime_float32(case) -> tuple[Run, dict]:
    """Optimise the exported graph with the optimiser for transformers, if it can; the session does the rest."""
    path, notes = exported(case), {}
    try:
        from onnxruntime.transformers import optimizer

        config = case.stock.config
        optimised = optimizer.optimize_model(
            str(path), "bert", config.num_attention_heads, config.hidden_size, opt_level=0
        )
        notes["fused"] = {name: count for name, count in optimised.get_fused_operator_statistics().items() if count}
        path = case.folder / f"{case.name}-fused.onnx"
        optimised.save_model_to_file(str(path))
    except Exception as error:
        notes["optimizer"] = f"{type(error).__name__}: {error}"[:200]
    return onnxruntime_run(case, path), notes


def onnxruntime_dynamic_int8(case) -> tuple[Run, dict]:
    """Quantise weights with a scale for each output; activations with one for each matrix, at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = case.folder / f"{case.name}-dynamic.onnx"
    reduced = not has_vnni()
    quantize_dynamic(exported(case), path, per_channel=True, reduce_range=reduced, weight_type=QuantType.QInt8)
    return onnxruntime_run(case, path), {"reduce_range": reduced}


def onnxruntime_static_int8(case, method: str) -> tuple[Run, dict]:
    """Quantise the products with weights, of activations with one scale that texts of train decide."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

    class Texts(CalibrationDataReader):
        def __init__(self):
            # Histograms are of texts that are all equally long.
            self.texts = case.calibration(same_length=method != "MinMax")

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.texts, None)

    path = case.folder / f"{case.name}-static-{method}.onnx"
    reduced = not has_vnni()
    quantize_static(
        exported(case),
        path,
        Texts(),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=reduced,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
        extra_options={"MatMulConstBOnly": True},
    )
    return onnxruntime_run(case, path), {"reduce_range": reduced, "calibration": method}


def openvino_run(case, model, **hints: str) -> tuple[Run, dict]:
    """Return what answers a batch with a model of OpenVINO, compiled once for all shapes."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": case.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", **hints}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()

    def run(input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        # A copy: the request writes its next answers to the same place.
        return request.infer({"input_ids": input_ids, "attention_mask": attention_mask}, share_inputs=True)[0].copy()

    return run, {"precision": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()}


def openvino_plain(case, **hints: str) -> tuple[Run, dict]:
    """Convert the exported graph. (Traced from PyTorch with a padded example, it was wrong at another shape.)"""
    import openvino

    return openvino_run(case, openvino.convert_model(exported(case)), **hints)


def openvino_int8(case, smooth: bool) -> tuple[Run, dict]:
    """Quantise with NNCF, of activations with scales that texts of train decide."""
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters

    nncf.set_log_level(40)
    smoothing = {} if smooth else {"smooth_quant_alphas": AdvancedSmoothQuantParameters(matmul=-1)}
    texts = list(case.calibration())
    model = nncf.quantize(
        openvino.convert_model(exported(case)),
        nncf.Dataset(texts),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(texts),
        advanced_parameters=nncf.AdvancedQuantizationParameters(**smoothing),
    )
    return openvino_run(case, model)


# By the names of their sides.
ENGINES: dict[str, Callable] = {
    "torch float32": torch_float32,
    "torch float32, compiled": torch_compiled,
    "torch bfloat16": torch_bfloat16,
    "torch dynamic int8": torch_dynamic_int8,
    "torchao int8": torchao_int8,
    "torchao int8, compiled": partial(torchao_int8, compiled=True),
    "onnxruntime float32": onnxruntime_float32,
    "onnxruntime dynamic int8": onnxruntime_dynamic_int8,
    "onnxruntime static int8, MinMax": partial(onnxruntime_static_int8, method="MinMax"),
    "onnxruntime static int8, Percentile": partial(onnxruntime_static_int8, method="Percentile"),
    "openvino float32": partial(openvino_plain, INFERENCE_PRECISION_HINT="f32"),
    "openvino, its own precision": openvino_plain,
    "openvino int8": partial(openvino_int8, smooth=True),
    "openvino int8, no smoothing": partial(openvino_int8, smooth=False),
}

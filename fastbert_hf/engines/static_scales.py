"""Fixed scales for the tokens of an OpenVINO export, from what its layers read of some texts, by NNCF."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import tqdm

from .backends import BACKENDS, import_engine
from .export_folder import file_digest, layers_name
from .exported_models import ExportedModel


# Texts are read until there are so many tokens: what every layer reads of them is kept while scales are chosen.
MOST_TOKENS = 20_000
# Texts that are run together: padding inside of attention is not what texts consist of.
BATCH_SIZE = 4


def put_static_scales(exported: ExportedModel, rows: Iterable[Mapping[str, Any]], progress: bool = True) -> None:
    """
    Quantise the layers of an exported model in its folder: each product gets one scale for what it reads, fixed by
    calibration, after large values were moved from tokens into weights (SmoothQuant, Xiao et al., ICML 2023).

    Args:
        exported ([`FastBertOpenVino`]): In float32; what was loaded of it is not changed.
        rows (iterable of `Mapping`): Texts as the tokenizer encodes them.
        progress (`bool`): Whether to show a progress bar.
    """
    nncf, openvino = import_engine(BACKENDS["openvino"], "nncf", "openvino")
    nncf.set_log_level(40)
    found, folder = exported.graphs.found, exported.graphs.folder
    read = inputs_of_layers(exported, rows)
    files, core = dict(found.files), openvino.Core()
    for name in tqdm([layers_name(*span) for span in found.spans], desc="Calibrating", disable=not progress):
        path = folder / f"{name}.xml"
        # Read from memory, as its own files take its place.
        weights = openvino.Tensor(np.fromfile(path.with_suffix(".bin"), np.uint8))
        with redirect_stdout(StringIO()):  # several bars for each graph
            model = nncf.quantize(
                core.read_model(path.read_bytes(), weights),
                nncf.Dataset(read.pop(name)),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=MOST_TOKENS,
                # Processors without VNNI add two products in 16 bits: weights have seven bits, for any machine.
                advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
            )
        openvino.save_model(model, path, compress_to_fp16=False)
        files.update({file: file_digest(folder / file) for file in (path.name, path.with_suffix(".bin").name)})
    replace(found, files=files, quantize="int8", static=True).write(Path(folder))


def inputs_of_layers(
    exported: ExportedModel, rows: Iterable[Mapping[str, Any]]
) -> dict[str, list[dict[str, np.ndarray]]]:
    """Return what the graphs of layers are given for some texts, by their names."""
    read: dict[str, list[dict[str, np.ndarray]]] = {layers_name(*span): [] for span in exported.graphs.found.spans}
    own_run = exported.graphs.run

    def run(name: str, given: dict) -> list[torch.Tensor]:
        if name in read:
            read[name].append({key: value.numpy() for key, value in given.items() if key != "levels"})
        return own_run(name, given)

    def few() -> Iterable[Mapping[str, Any]]:
        tokens = 0
        for row in rows:
            yield row
            tokens += len(row["input_ids"])
            if tokens >= MOST_TOKENS:
                return

    exported.graphs.run = run
    try:
        for _ in exported.predict(few(), speed=0.0, batch_size=BATCH_SIZE):
            pass
    finally:
        del exported.graphs.run
    return read

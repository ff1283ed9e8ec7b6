"""Exported models: asked in every way, whole folders and broken ones, certificates, threads, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import onnx as onnx_library
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from fastbert_hf import (
    CascadeForSequenceClassification,
    FastBertForSequenceClassification,
    FastBertOnnx,
    FastBertOpenVino,
    calibrate,
    export,
    save_with_code,
)
from fastbert_hf.engines import exporter
from fastbert_hf.engines.backends import openvino_rounds_tokens
from fastbert_hf.engines.exported_models import EXPORTED_MODELS
from fastbert_hf.evaluation import record_exits, replay_at_speed

from ..common import assert_close, ragged_batch, tiny_model, tiny_texts, tiny_tokenizer


pytestmark = pytest.mark.usefixtures("quick_export")

KINDS = (("onnx", None), ("onnx", "int8"), ("openvino", None), ("openvino", "int8"))
FORMATIONS = ({"batch_size": 1}, {"batch_size": 7}, {"batch_tokens": 50}, {"rebatch": False}, {"batch_tokens": 4096})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of one model for each backend and precision, made when it is first asked for."""
    made = {}

    def folder_of(backend: str, quantize: str | None = None) -> Path:
        if (backend, quantize) not in made:
            folder = tmp_path_factory.mktemp(f"{backend}-{quantize}") / "model"
            settings = {"quantize": quantize, "tokenizer": tiny_tokenizer(), "progress": False}
            made[backend, quantize] = export(tiny_model(), folder, backend, **settings)
        return made[backend, quantize]

    return folder_of


@pytest.fixture
def onnx(folders, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(folders("onnx"), tmp_path / "copy"))


@pytest.fixture(scope="module")
def texts() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 40, (40,), generator=generator).tolist()
    return [{"input_ids": torch.randint(5, 100, (length,), generator=generator).tolist()} for length in lengths]


def load(folder: Path, **settings):
    return AutoModelForSequenceClassification.from_pretrained(folder, **settings)


def answers(model, texts, speed: float | list[float] = 0.78, **how) -> tuple[torch.Tensor, list[int]]:
    found = list(model.predict(texts, speed=speed, **how))
    return torch.stack([answer.logits for answer in found]), [answer.exit_layer for answer in found]


@pytest.mark.parametrize(("backend", "quantize"), KINDS)
def test_an_answer_does_not_depend_on_its_batch_mates_to_the_bit(folders, texts, backend, quantize):
    model = load(folders(backend, quantize), num_threads=2)
    logits, layers = answers(model, texts)
    assert len(set(layers)) > 1
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    for formation in FORMATIONS:
        other, other_layers = answers(model, [texts[place] for place in order], **formation)
        assert [layers[place] for place in order] == other_layers
        # Where OpenVINO cannot round tokens, it multiplies int8 weights in float32, and cuts those sums otherwise.
        in_float32 = (backend, quantize) == ("openvino", "int8") and not openvino_rounds_tokens()
        assert_close(other, logits[order], 1e-5 if in_float32 else 0.0)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_int8_answers_as_in_pytorch(folders, texts, backend):
    model = tiny_model()
    model.use_int8_layers()
    (wanted, _), (found, _) = (answers(own, texts, 0.0) for own in (model, load(folders(backend, "int8"))))
    # Tiny layers amplify a step of rounding: the errors of int8 itself are as large.
    exact, _ = answers(tiny_model(), texts, 0.0)
    assert (found - wanted).abs().mean() < 2 * (wanted - exact).abs().mean()
    assert (found - wanted).abs().max() < 0.2 * wanted.std()


def test_scales_that_texts_fixed(folders, texts, tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    settings = {"backend": "openvino", "quantize": "int8", "tokenizer": tokenizer, "progress": False}
    calibration = tiny_texts(16)
    folder = export(model, tmp_path / "static", calibration_texts=calibration, layers_per_stage=4, **settings)
    exported = load(folder, num_threads=2)
    assert exported.graphs.found.static
    exact, _ = answers(model, texts, 0.0)
    found, _ = answers(exported, texts, 0.0)
    assert 0 < (found - exact).abs().mean() < 0.2 * exact.std()
    assert not torch.equal(found, answers(load(folders("openvino", "int8")), texts, 0.0)[0])
    for formation in FORMATIONS:
        assert torch.equal(answers(exported, texts, 0.0, **formation)[0], found)
    for wrong, message in (
        ({"backend": "onnx"}, "calibration_texts are for a model in float32"),
        ({"quantize": None}, "calibration_texts are for a model in float32"),
        ({"calibration_texts": "a text"}, "must be a list of texts"),
        ({"calibration_texts": []}, "must be a list of texts"),
        ({"calibration_texts": [1]}, "must be a list of texts"),
    ):
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "no", **{**settings, "calibration_texts": calibration, **wrong})


def test_seven_bits_are_taken_where_bytes_overflow(folders, texts, monkeypatch):
    model = load(folders("onnx", "int8"))
    assert model.graphs.levels in (255, 127)
    (exact, _), (eight, _) = answers(load(folders("onnx")), texts, 0.0), answers(model, texts, 0.0)
    own_run, asked = model.graphs.run, []

    def overflowing(name, given):
        outputs = own_run(name, given)
        if name != "probe":
            return outputs
        asked.append(float(given["levels"]))
        return [outputs[0] * (0.9 if given["levels"] == 255 else 1.0)]

    model.graphs._levels = None
    monkeypatch.setattr(model.graphs, "run", overflowing)
    assert model.graphs.levels == 127
    assert asked == [255.0, 255.0, 127.0, 127.0]
    seven, _ = answers(model, texts, 0.0)
    assert (eight - exact).abs().mean() < (seven - exact).abs().mean() < 0.1 * exact.std()
    model.graphs._levels = None
    monkeypatch.setattr(model.graphs, "run", lambda name, given: [own * 0 for own in own_run(name, given)])
    with pytest.raises(RuntimeError, match="adds products of bytes wrongly"):
        model.graphs.levels  # noqa: B018


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_replay_tells_what_predict_answers(folders, texts, backend):
    model = load(folders(backend))
    record = record_exits(model, texts, progress=False)
    assert record.layer_flops.gt(0).all()
    for policy in ("entropy", "margin", "patience"):
        model.config.exit_policy = policy
        for speed in (0.2, 0.7):
            logits, layers = answers(model, texts, speed)
            replayed = replay_at_speed(record, model.config, speed)
            assert replayed.exit_layer.tolist() == layers
            assert_close(replayed.logits, logits, 1e-6)


def test_the_pipeline_runs_a_folder(folders):
    clf = pipeline("fast-text-classification", model=str(folders("onnx")))
    own = pipeline("fast-text-classification", model=tiny_model(), tokenizer=tiny_tokenizer())
    texts = tiny_texts()
    assert type(clf.model) is FastBertOnnx
    for arguments in ({"speed": 0.5}, {"speed": 0.0, "top_k": None}, {"max_layers": 2}):
        for one, other in zip(clf(texts, **arguments), own(texts, **arguments), strict=True):
            one, other = (answer if isinstance(answer, list) else [answer] for answer in (one, other))
            assert [(row["label"], row["exit_layer"]) for row in one] == [
                (row["label"], row["exit_layer"]) for row in other
            ]
            assert [row["score"] for row in one] == pytest.approx([row["score"] for row in other], abs=1e-5)
    assert type(AutoModel.from_pretrained(folders("openvino"))) is FastBertOpenVino


def test_a_calibration_goes_along_and_a_certificate_does_not(folders, tmp_path):
    model, texts = tiny_model(exit_type="linear"), tiny_texts(300, seed=3)
    tokenizer = tiny_tokenizer()
    calibrate(model, texts, tokenizer, progress=False)
    exported = load(export(model, tmp_path / "onnx", tokenizer=tokenizer, progress=False))
    encoded = tokenizer(texts[:20])
    (one, layers), (other, other_layers) = (answers(own, encoded, None, speedup=1.3) for own in (model, exported))
    assert layers == other_layers
    assert_close(one, other, 1e-4)
    with pytest.raises(ValueError, match="certified with engine='torch', and here it is 'onnx'"):
        list(exported.predict(encoded, max_disagreement=0.5))
    exported.certify(texts, tokenizer, max_disagreement=0.5, progress=False)
    assert exported.config.certification["setting"]["engine"] == "onnx"
    assert len(list(exported.predict(encoded, max_disagreement=0.5))) == 20
    exported.save_pretrained(tmp_path / "certified")
    again = load(tmp_path / "certified")
    assert len(list(again.predict(encoded, max_disagreement=0.5))) == 20
    model.config.certification = again.config.certification
    with pytest.raises(ValueError, match="certified with engine='onnx', and here it is 'torch'"):
        list(model.predict(encoded, max_disagreement=0.5))
    # Another export of the same model has other files, which a certificate is of, too.
    assert load(folders("onnx")).weights_digest(True) != load(folders("onnx", "int8")).weights_digest(True)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_threads_share_a_model(folders, texts, backend):
    model = load(folders(backend), num_threads=1)
    wanted, _ = answers(load(folders(backend), num_threads=1), texts)
    with ThreadPoolExecutor(4) as pool:
        for found, _ in pool.map(lambda _: answers(model, texts), range(12)):
            assert torch.equal(found, wanted)


def test_copies_and_saved_ones_answer_the_same(folders, texts, tmp_path):
    model = load(folders("onnx"))
    wanted, _ = answers(model, texts)
    model.config.speed = 0.25
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config.speed == 0.25
    for own in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert torch.equal(answers(own, texts)[0], wanted)
    model.save_pretrained(folders("onnx"))  # in place
    assert torch.equal(answers(load(folders("onnx")), texts)[0], wanted)


def lose(name: str):
    return lambda folder: (folder / name).unlink()


def change_byte(folder: Path) -> None:
    content = bytearray((folder / "layers_02.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "layers_02.onnx").write_bytes(bytes(content))


def with_field(name: str, value):
    def change(folder: Path) -> None:
        stages = json.loads((folder / "stages.json").read_text())
        stages[name] = {**stages[name], **value} if isinstance(value, dict) else value
        (folder / "stages.json").write_text(json.dumps(stages))

    return change


def with_text(text: str):
    return lambda folder: (folder / "stages.json").write_text(text)


BROKEN = {
    "half written": (lose("stages.json"), "has no stages.json, so it is no exported model, or was not written"),
    "a lost layer": (lose("layers_03.onnx"), "has no layers_03.onnx, which stages.json names"),
    "a changed byte": (change_byte, "layers_02.onnx is not what was written there"),
    "no JSON": (with_text("{"), "is not what fastbert_hf.export writes"),
    "a list": (with_text("[1]"), "is not what fastbert_hf.export writes"),
    "no object": (with_text("1"), "is not what fastbert_hf.export writes"),
    "too deep": (with_text("[" * 100_000), "is not what fastbert_hf.export writes"),
    "too large": (with_text(" " * 2_000_000), "as it has 2,000,000 bytes"),
    "another format": (with_field("format", 2), "has format 2, and this version reads 1"),
    "no such backend": (with_field("backend", "tensorrt"), "is not what fastbert_hf.export writes"),
    "an unhashable backend": (with_field("backend", ["onnx"]), "is not what fastbert_hf.export writes"),
    "another number of layers": (
        with_field("model", {"num_hidden_layers": 3}),
        "is not what fastbert_hf.export writes",
    ),
    "a long number": (with_text('{"format": ' + "1" * 5000 + "}"), "is not what fastbert_hf.export writes"),
    "another width": (with_field("model", {"hidden_size": 16}), "have hidden_size=16, and the config says 32"),
    "other positions": (with_field("model", {"positions": "after_padding"}), "have positions='after_padding'"),
    "no model": (with_field("model", None), "is not what fastbert_hf.export writes"),
    "no number of layers": (with_field("layers_per_stage", 0), "is not what fastbert_hf.export writes"),
    "true layers": (with_field("model", {"num_hidden_layers": True}), "is not what fastbert_hf.export writes"),
    "a file elsewhere": (with_field("files", {"../../etc/passwd": "0" * 64}), "is not what fastbert_hf.export writes"),
    "a wrong digest": (with_field("files", {"exit_01.onnx": 7}), "is not what fastbert_hf.export writes"),
    "a further field": (with_field("code", "import os"), "is not what fastbert_hf.export writes"),
    "no digest": (with_field("weights", "x"), "is not what fastbert_hf.export writes"),
    "other rotary types": (with_field("model", {"rotary": ["a", "b"]}), "have rotary="),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_clear_error(onnx, name):
    breaks, message = BROKEN[name]
    breaks(onnx)
    with pytest.raises(ValueError, match=message):
        load(onnx)


def test_a_config_of_another_model_is_refused(onnx, folders):
    config = json.loads((onnx / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    (onnx / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="have num_hidden_layers=4, and the config says 5"):
        load(onnx)
    with pytest.raises(ValueError, match="have num_labels=3, and the config says 5"):
        load(folders("onnx"), num_labels=5)


def test_a_loaded_model_does_not_notice_what_happens_to_its_folder(onnx, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(onnx.parent)
    model = load(Path(onnx.name))
    wanted, _ = answers(model, texts[:5])
    monkeypatch.chdir(tmp_path.parent)
    clf = pipeline("fast-text-classification", model=model)  # finds its tokenizer
    assert len(clf(["word5", "word6"])) == 2
    change_byte(onnx)
    with pytest.raises(ValueError, match="is not what was written there"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    shutil.rmtree(onnx)
    assert torch.equal(answers(model, texts[:5])[0], wanted)


def test_an_older_export_leaves_nothing_behind(onnx, tmp_path):
    (onnx / "notes.md").write_text("mine")
    (onnx / "secret.env").write_text("x")
    export(tiny_model(exit_type="linear"), onnx, tokenizer=tiny_tokenizer(), layers_per_stage=2, progress=False)
    names = sorted(file.name for file in onnx.iterdir())
    assert [name for name in names if name.startswith("layers")] == ["layers_01_02.onnx", "layers_03_04.onnx"]
    assert {"notes.md", "secret.env"} <= set(names)
    model = load(onnx)
    (onnx / "stages.json").unlink()  # as where a computer stopped
    with pytest.raises(ValueError, match="was not written to its end"):
        load(onnx)
    model.save_pretrained(onnx)
    load(onnx).save_pretrained(tmp_path / "saved")
    saved = {file.name for file in (tmp_path / "saved").iterdir()}
    assert saved == {file.name for file in onnx.iterdir()} - {"notes.md", "secret.env"}
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="holds another checkpoint"):
        model.save_pretrained(tmp_path / "checkpoint")


def test_a_graph_reads_no_other_file(onnx, tmp_path, monkeypatch):
    graph = onnx_library.load(onnx / "exit_04.onnx")
    weights = next(own for own in graph.graph.initializer if own.name.endswith("exit_dense.weight"))
    (tmp_path / "elsewhere.bin").write_bytes(weights.raw_data)
    onnx_library.external_data_helper.set_external_data(weights, "elsewhere.bin")
    weights.ClearField("raw_data")
    (onnx / "exit_04.onnx").write_bytes(graph.SerializeToString())
    digest = sha256((onnx / "exit_04.onnx").read_bytes()).hexdigest()
    with_field("files", {"exit_04.onnx": digest})(onnx)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=r"elsewhere.bin|xternal"):
        load(onnx)


def test_an_accelerator_is_not_taken_by_default(folders, monkeypatch):
    model = load(folders("onnx"))
    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)
    clf = pipeline("fast-text-classification", model=model)
    assert clf.device == torch.device("cpu")
    assert len(clf("word5")) == 1


def test_code_in_a_folder_is_not_run(onnx, tmp_path):
    (onnx / "fastbert_reader.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("modeling_fastbert.py", "sitecustomize.py"):
        shutil.copyfile(onnx / "fastbert_reader.py", onnx / name)
    pipeline("fast-text-classification", model=str(onnx))("word5 word6")
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_loaded_by_its_own_class(folders):
    with pytest.raises(ValueError, match=r"was written for 'openvino'.*load it with FastBertOpenVino"):
        FastBertOnnx.from_pretrained(folders("openvino"), config=FastBertOnnx.from_pretrained(folders("onnx")).config)
    with pytest.raises(ValueError, match="'fastbert_onnx' checkpoint, which export wrote for another engine"):
        FastBertForSequenceClassification.from_pretrained(folders("onnx"))


def test_what_is_no_exported_model_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'fastbert' checkpoint"):
        FastBertOnnx.from_pretrained(tmp_path)


def test_what_only_pytorch_can_do_is_refused(folders, texts):
    model = load(folders("onnx"))
    batch = ragged_batch()
    for act, message in {
        (lambda: model.train()): "cannot learn",
        (lambda: model.half()): "cannot be moved or cast",
        (lambda: model.to("meta")): "cannot be moved or cast",
        (lambda: load(folders("onnx"), device_map="auto")): "Leave it out",
        (lambda: save_with_code(model, "elsewhere")): "code beside graphs would not run them",
        (lambda: model.use_int8_layers()): "quantize=",
        (lambda: model(inputs_embeds=torch.zeros(1, 2, 32))): "reads input_ids, not inputs_embeds",
        (lambda: model(**batch, output_hidden_states=True)): "no output_hidden_states",
        (lambda: model(**batch, retention=0.5)): "coarsening",
        (lambda: export(model, "elsewhere")): "export takes a FastBertForSequenceClassification, got FastBertOnnx",
        (lambda: load(folders("onnx"), dtype=torch.float16)): "answers in float32",
        (lambda: load(folders("onnx"), num_threads=0)): "num_threads must be a whole number",
    }.items():
        with pytest.raises(ValueError, match=message):
            act()
    with pytest.raises(TypeError, match="does not know gguf_file"):
        FastBertOnnx.from_pretrained(folders("onnx"), gguf_file="x")
    with pytest.raises(OSError, match="there is no folder /nowhere/at/all"):
        FastBertOnnx.from_pretrained("/nowhere/at/all")
    for ids in ([[5, 100]], [[5, -1]]):
        with pytest.raises(IndexError, match="input_ids must be from 0 to 99"):
            model(torch.tensor(ids))
    assert model.to("cpu") is model.cpu() is model.float() is model
    assert not model.training
    assert len(list(model.eval().predict(texts[:2], speed=0.5))) == 2


def test_what_cannot_be_exported_is_refused(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    shorter = tiny_model(coarsening={"layers": [2], "retention": [0.5]})
    trees = tiny_model(feed_forward={"form": "leaves", "depth": 1, "leaf_size": 32})
    cascade = CascadeForSequenceClassification.from_members([model, tiny_model(seed=1)])
    stale = tiny_model(distilled_for="float32:0123456789abcdef")
    for own, settings, message in (
        (shorter, {}, "config.coarsening cannot be exported"),
        (trees, {}, "config.feed_forward cannot be exported"),
        (cascade, {}, "export each member"),
        (model, {"quantize": "int4"}, "quantize='int4' is not known"),
        (model, {"layers_per_stage": 5}, "layers_per_stage must be from 1 to 4"),
        (model, {"layers_per_stage": True}, "layers_per_stage must be from 1 to 4"),
        (model, {"backend": "tensorrt"}, "backend='tensorrt' is not known; choose one of onnx, openvino"),
        (model, {"tokenizer": None}, "the tokenizer of this FastBertForSequenceClassification is not known"),
        (stale, {}, "was trained after the students"),
    ):
        with pytest.raises(ValueError, match=message):
            export(own, tmp_path / "folder", **{"tokenizer": tokenizer, "progress": False, **settings})
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="holds another checkpoint, which an export would overwrite"):
        export(model, tmp_path / "checkpoint", tokenizer=tokenizer)


def test_an_export_that_fails_leaves_the_folder_as_it_was(onnx, texts, monkeypatch):
    wanted, _ = answers(load(onnx), texts)
    before = sorted(file.name for file in onnx.iterdir())

    def fill_wrongly(program, graph):
        for value in graph.state_dict().values():
            value.mul_(1.01)
        own_fill(program, graph)

    own_fill = exporter.fill
    monkeypatch.setattr(exporter, "fill", fill_wrongly)
    with pytest.raises(RuntimeError, match="the graphs answer otherwise than the model"):
        export(tiny_model(seed=1, exit_type="linear"), onnx, tokenizer=tiny_tokenizer(), progress=False)
    assert sorted(file.name for file in onnx.iterdir()) == before
    assert sorted(file.name for file in onnx.parent.iterdir()) == [onnx.name]
    assert torch.equal(answers(load(onnx), texts)[0], wanted)


def test_an_engine_that_is_missing_is_named_with_its_extra(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"backend='onnx' needs onnxruntime.*pip install 'fastbert-hf\[onnx\]'"):
        export(tiny_model(), tmp_path / "folder", tokenizer=tiny_tokenizer())
    with pytest.raises(ImportError, match=r"pip install 'fastbert-hf\[onnx\]'"):
        load(folders("onnx"))


def test_every_exported_model_is_in_the_table():
    assert {name: own.engine_name for name, own in EXPORTED_MODELS.items()} == {"onnx": "onnx", "openvino": "openvino"}

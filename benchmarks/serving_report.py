"""docs/performance.md from the numbers of the finished comparisons: no number is written that was not measured."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import rivals_report
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from report_cells import NOT_YET

from fastbert_hf.evaluation.figures import COLOURS, MARKERS, STYLE, save_figure
from fastbert_hf.files import write_whole


# Name of the comparison, case within it, what it is, against what, target, and what the target is of.
TARGETS = (
    ("stream_base", None, "speed 0, reviews, BERT-base", "stock pipeline at its best batch size", 1.8),
    ("stream_minilm", None, "speed 0, reviews, MiniLM", "stock pipeline at its best batch size", 1.8),
    ("sorted_base", None, "speed 0, reviews, BERT-base", "stock model, sorted by length, its best batch size", 1.1),
    ("sorted_minilm", None, "speed 0, reviews, MiniLM", "stock model, sorted by length, its best batch size", 1.1),
    ("equal_base", None, "speed 0, all of 40 tokens, BERT-base", "stock model, same batch size (32)", 0.97),
    ("equal_minilm", None, "speed 0, all of 40 tokens, MiniLM", "stock model, same batch size (32)", 0.97),
    ("single_base", None, "speed 0, one text at a time, BERT-base", "stock pipeline, one at a time", 1.1),
    ("single_minilm", None, "speed 0, one text at a time, MiniLM", "stock pipeline, one at a time", 1.1),
    ("exits_stream", "BERT-base, 0.5", "half of the layers, a stream, BERT-base", "ideal", 0.93),
    ("exits_stream", "BERT-base, 0.25", "a quarter of the layers, a stream, BERT-base", "ideal", 0.93),
    ("exits_stream", "MiniLM, 0.5", "half of the layers, a stream, MiniLM", "ideal", None),
    ("exits_stream", "MiniLM, 0.25", "a quarter of the layers, a stream, MiniLM", "ideal", None),
    ("exits_single", "BERT-base, 0.5", "half of the layers, one at a time, BERT-base", "ideal", 0.88),
    ("exits_single", "BERT-base, 0.25", "a quarter of the layers, one at a time, BERT-base", "ideal", 0.88),
    ("exits_single", "MiniLM, 0.5", "half of the layers, one at a time, MiniLM", "ideal", None),
    ("exits_single", "MiniLM, 0.25", "a quarter of the layers, one at a time, MiniLM", "ideal", None),
    ("cascade", "BERT-base, 0.6", "cascade, 2 of 2 + 12 layers answer 60 %, a stream, BERT-base", "layers", 0.9),
    ("cascade", "BERT-base, 0.9", "cascade, 2 of 2 + 12 layers answer 90 %, a stream, BERT-base", "layers", 0.9),
    ("cascade", "MiniLM, 0.6", "cascade, 2 of 2 + 6 layers answer 60 %, a stream, MiniLM", "layers", None),
    ("cascade", "MiniLM, 0.9", "cascade, 2 of 2 + 6 layers answer 90 %, a stream, MiniLM", "layers", None),
    ("pypi_stream", "0.5", "half of the layers, a stream, BERT-base", "PyPI fastbert 0.2.2", 6),
    ("pypi_stream", "0.25", "a quarter of the layers, a stream, BERT-base", "PyPI fastbert 0.2.2", 6),
    ("pypi_single", "0.5", "half of the layers, one at a time, BERT-base", "PyPI fastbert 0.2.2", 3),
    ("pypi_single", "0.25", "a quarter of the layers, one at a time, BERT-base", "PyPI fastbert 0.2.2", 3),
    ("peak_float32", None, "12 packed layers, 32 texts, float32", "their matrix products by torch.matmul", 0.88),
    ("peak_bfloat16", None, "12 packed layers, 32 texts, bfloat16", "their matrix products by torch.matmul", 0.72),
    ("memory", None, "peak memory, 100,000 texts of a generator", "10,000 texts", 1.05),
)


def write(docs_dir: Path) -> None:
    """Writes the page and its figures, with `NOT_YET` where a comparison has no numbers."""
    results = load(docs_dir / "performance")
    others = [load(folder) for folder in sorted((docs_dir / "performance").iterdir()) if folder.is_dir()]
    template = (Path(__file__).parent / "performance_template.md").read_text(encoding="utf-8")
    parts = {
        "targets": targets_table(results),
        "options": options_table(results),
        "settings": settings_of(results),
        "width_layer": width_table(results, "width_layer"),
        "width_encoder": width_table(results, "width_encoder"),
        "width_settings": settings_of_run(results, "width_layer"),
        "length": length_table(results),
        "rivals": rivals_report.tables(docs_dir / "performance") or NOT_YET,
        "int8": int8_table(results),
        "int8_memory": int8_memory(results),
        "int8_of_ideal": int8_of_ideal(results),
        "int8_settings": settings_of_run(results, "int8"),
        "int8_others": "\n\n".join(map(int8_of_another_machine, others)),
    }
    for name, text in parts.items():
        template = template.replace("{{" + name + "}}", text)
    write_whole(docs_dir / "performance.md", template)
    (docs_dir / "figures").mkdir(parents=True, exist_ok=True)
    save_figure(plot_flow(), docs_dir / "figures" / "flow")
    if "layer_cost" in results:
        save_figure(plot_layer_cost(results["layer_cost"]["result"]), docs_dir / "figures" / "layer_cost")
    if "growth" in results:
        save_figure(plot_growth(results["growth"]["result"]), docs_dir / "figures" / "growth")


def load(folder: Path) -> dict[str, dict]:
    """Return the results of one machine by their names."""
    files = [path for path in folder.glob("*.json") if not path.name.startswith("rivals_")]
    return {path.stem: json.loads(path.read_text()) for path in files}


def result_of(results: dict, name: str, case: str | None) -> dict | None:
    result = results.get(name, {}).get("result")
    return result if result is None or case is None else result.get(case)


def targets_table(results: dict) -> str:
    lines = ["| what | against | target | reached | range | texts/s |", "| --- | --- | --- | --- | --- | --- |"]
    for name, case, what, against, target in TARGETS:
        result = result_of(results, name, case)
        if against in ("ideal", "layers") and result:
            kind = "ideal speed-up" if against == "ideal" else "fewer layers"
            against = f"{kind}, {result['ideal']:.2f}x; {result['speed_up']:.2f}x measured"
        is_memory = name == "memory"
        wanted = "-" if target is None else f"at most {target:g}" if is_memory else f"at least {target:g}"
        if result is None:
            lines.append(f"| {what} | {against} | {wanted} | {NOT_YET} | | |")
            continue
        met = target is None or (result["ratio"] <= target if is_memory else result["ratio"] >= target)
        spread = f"{result['least']:.2f} to {result['greatest']:.2f}" if "least" in result else ""
        reached = f"{result['ratio']:.2f}" if met else f"**{result['ratio']:.2f}**"
        lines.append(f"| {what} | {against} | {wanted} | {reached} | {spread} | {rates_of(result)} |")
    return "\n".join(lines)


def rates_of(result: dict) -> str:
    if "gigaflops" in result:
        return "{layers:.0f} of {matmul:.0f} GFLOP/s".format(**result["gigaflops"])
    if "kibibytes" in result:
        return " and ".join(f"{int(value) / 1024:.0f} MiB" for value in result["kibibytes"].values())
    rates = result["texts_per_second"]
    own = next(iter(rates.values())) if "fast" not in rates else rates["fast"]
    name, other = ("full depth", rates["full"]) if "full" in rates else other_side(result, rates)
    return f"{own:.0f}, {name} {other:.0f}"


def other_side(result: dict, rates: dict) -> tuple[str, float]:
    name = result.get("stock_at_its_best") or next(name for name in rates if name != next(iter(rates)))
    return name, rates[name]


def options_table(results: dict) -> str:
    lines = ["| option | shape | faster by | range |", "| --- | --- | --- | --- |"]
    titles = {
        "rebatching": "survivors joined (`rebatch`), against apart; share of the layers",
        "bfloat16": "bfloat16, against float32, speed 0",
        "compiled": "`torch.compile` of each layer, speed 0",
    }
    for name, title in titles.items():
        for case, result in results.get(name, {}).get("result", {}).items():
            note = (
                f"; {result['first_call_seconds']:.0f} s for the first call" if "first_call_seconds" in result else ""
            )
            spread = f"{result['least']:.2f} to {result['greatest']:.2f}{note}"
            lines.append(f"| {title} | {case} | {result['ratio']:.2f}x | {spread} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_YET


def int8_table(results: dict) -> str:
    """Return how many times faster int8 and bfloat16 are than float32."""
    rows = [row for name in ("int8", "int8_exits") for row in results.get(name, {}).get("result", [])]
    if not rows:
        return NOT_YET
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        range_of = f"{row['least']:.2f} to {row['greatest']:.2f}"
        cells.setdefault((row["shape"], row["case"]), {})[row["kind"]] = f"{row['ratio']:.2f}x ({range_of})"
    lines = [f"| shape | what | {' | '.join(kinds)} |", f"| --- | --- |{' --- |' * len(kinds)}"]
    lines += [f"| {shape} | {case} | {' | '.join(map(own.get, kinds))} |" for (shape, case), own in cells.items()]
    return "\n".join(lines)


def int8_of_another_machine(results: dict) -> str:
    """Return what int8 and bfloat16 give on a machine that is not the page's."""
    settings = next(iter(results.values()))["settings"]
    return (
        f"On another machine ({settings['processor']}, {settings['instructions']}; {settings['threads']} threads, "
        f"torch {settings['torch']}):\n\n{int8_table(results)}\n\nOf the FLOPs that exits save, the clock shows there "
        f"with int8 and the operators: {int8_of_ideal(results)}."
    )


def int8_of_ideal(results: dict) -> str:
    """Return which part of the FLOPs that exits save with int8 layers is saved in time, too."""
    rows = results.get("int8_exits", {}).get("result", [])
    found = [
        f"{row['of_ideal']:.2f} with {row['shape']}, {row['case'].partition(', ')[2]}"
        for row in rows
        if row["kind"] == "int8, compiled" and "of_ideal" in row
    ]
    return "; ".join(found) or NOT_YET


def int8_memory(results: dict) -> str:
    """Return the share of the memory of float32 that int8 takes at its peak."""
    of_shape = results.get("int8_memory", {}).get("result")
    if of_shape is None:
        return NOT_YET
    return " and ".join(
        f"{own['ratio']:.2f} of float32 for {shape} ({own['kibibytes']['int8'] / 1024:.0f} of "
        f"{own['kibibytes']['float32'] / 1024:.0f} MiB)"
        for shape, own in of_shape.items()
    )


def length_table(results: dict) -> str:
    """Return how many times faster shorter texts are answered, beside the FLOPs that they save."""
    rows = results.get("length", {}).get("result")
    if rows is None:
        return NOT_YET
    lines = [
        "| shape | tokens of a text | the others are | fewer FLOPs | faster by | of the ideal | range |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = f"{row['least']:.2f} to {row['greatest']:.2f}"
        cells = [row["shape"], f"{3 * row['tokens'] // 4} to {row['tokens']}", row["kind"], f"{row['flops']:.2f}x"]
        cells += [f"{row['time']['ratio']:.2f}x", f"{row['ratio']:.2f}", spread]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def width_table(results: dict, name: str) -> str:
    """Return how many times faster each width is, with operators and without, by the tokens of a batch."""
    rows = results.get(name, {}).get("result")
    if rows is None:
        return NOT_YET
    tokens = sorted({row["tokens"] for row in rows})
    by_case: dict[tuple[str, str], dict[tuple[int, str], float]] = {}
    for row in rows:
        by_case.setdefault((row["shape"], row["kind"]), {})[row["tokens"], row["how"]] = row["ratio"]
    dense = {(row["shape"], row["tokens"]): row["dense_milliseconds"] for row in rows}
    lines = [
        f"| shape | neurons of a token | {' | '.join(f'{count:,} tokens' for count in tokens)} |",
        "| --- " * (len(tokens) + 2) + "|",
    ]
    for (shape, kind), ratios in by_case.items():
        cells = [f"{ratios[count, 'compiled']:.2f}x ({ratios[count, 'PyTorch']:.2f}x)" for count in tokens]
        lines.append(
            f"| {shape} | {kind.replace('.00%', ' %').replace('%', ' %').replace('  ', ' ')} | {' | '.join(cells)} |"
        )
    for shape in dict.fromkeys(shape for shape, _ in by_case):
        cells = [f"{dense[shape, count]:.2f} ms" for count in tokens]
        lines.append(f"| {shape} | all, dense: time | {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_of_run(results: dict, name: str) -> str:
    """Return where the times of a comparison were taken."""
    settings = results.get(name, {}).get("settings")
    return (
        NOT_YET
        if settings is None
        else f"{settings['threads']} threads, {settings['machine']}, torch {settings['torch']}"
    )


def settings_of(results: dict) -> str:
    if not results:
        return NOT_YET
    settings = next(iter(results.values()))["settings"]
    first = "oneDNN" if settings["onednn_is_faster"] else "MKL"
    return (
        f"{settings['threads']} threads, {settings['machine']}, torch {settings['torch']}, transformers "
        f"{settings['transformers']}; reviews of {settings['reviews']}, cut at 128 tokens; float32 layers by {first}, "
        "the faster one here"
    )


def plot_layer_cost(rows: list[dict]) -> Figure:
    """Microseconds a token over the tokens of a batch, one line for each shape and dtype."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for index, case in enumerate(dict.fromkeys((row["shape"], row["dtype"]) for row in rows)):
            chosen = [row for row in rows if (row["shape"], row["dtype"]) == case]
            axes.loglog(
                [row["tokens"] for row in chosen],
                [row["microseconds"] for row in chosen],
                color=COLOURS[index],
                marker=MARKERS[index],
                label=", ".join(case),
            )
        axes.axvline(1024, color="#888888", linewidth=1, linestyle="--")
        axes.set(xlabel="Tokens of a packed batch", ylabel="µs per token and layer")
        ticks = sorted({row["tokens"] for row in rows})[::2]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_yticks(values := [10, 20, 50, 100, 200, 500], [str(value) for value in values])
        axes.minorticks_off()
        figure.legend(loc="outside right upper")
    return figure


def plot_growth(curves: dict[str, list[dict]]) -> Figure:
    """Seconds over each thing that grows, from zero, so that a straight line through the origin is one."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        for index, (axes, (name, points)) in enumerate(zip(figure.subplots(1, 4), curves.items(), strict=True)):
            axes.plot(
                [point["value"] for point in points],
                [point["seconds"] for point in points],
                color=COLOURS[index],
                marker=MARKERS[index],
            )
            axes.set(xlabel=name.capitalize(), ylabel="Seconds" if index == 0 else "")
            axes.set_ylim(0, 1.2 * max(point["seconds"] for point in points))
            if name == "classes":
                axes.set_xscale("log")
                axes.minorticks_off()
            else:
                axes.set_xlim(0, 1.08 * points[-1]["value"])
                axes.locator_params(nbins=4)
    return figure


def plot_flow() -> Figure:
    """How texts flow through the engine: three packed batches, exits, and survivors that are joined."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.9), layout="constrained")
        axes = figure.subplots()
        axes.set(xlim=(0, 100), ylim=(0, 42))
        axes.axis("off")
        titles = ((7, "texts, as they come"), (28, "packed batches"), (48, "layer 1, exit 1"), (66, "layer 2, exit 2"))
        for x, title in (*titles, (82, "layer 3, exit 3"), (95, "answers")):
            axes.text(x, 40.5, title, ha="center", va="top")
        lengths = (5, 2, 9, 3, 7, 2, 8, 4, 3)
        leaves = (2, 1, 3, 1, 1, 2, 1, 2, 1)
        order = sorted(range(9), key=lambda row: lengths[row])
        ends = accumulate(lengths[row] for row in order)
        batch_of = {row: (end - 1) * 3 // sum(lengths) for row, end in zip(order, ends, strict=True)}

        def box(x: float, y: float, row: int, width: float = 1.2) -> None:
            colour = COLOURS[leaves[row] - 1]
            axes.barh(y, lengths[row] * width, left=x, height=2.2, color=colour, edgecolor="white", linewidth=0.8)

        for row in range(9):
            box(2, 34 - 3.6 * row, row)
            box(94, 34 - 3.6 * row, row, 0.35)
        heights = {0: 32, 1: 20, 2: 8}
        for column, (start, deep) in enumerate(((20, 1), (41, 1), (60, 2), (77, 3))):
            taken: dict[int, float] = {}
            for row in order:
                if leaves[row] >= deep:
                    # Below the first exit the survivors of all batches fit into one.
                    batch = 1 if column > 1 else batch_of[row]
                    left = taken.get(batch, start)
                    box(left, heights[batch], row, 0.62)
                    taken[batch] = left + lengths[row] * 0.62
            for batch, right in taken.items():
                axes.add_patch(
                    Rectangle((start - 0.5, heights[batch] - 2), right - start + 1, 4, fill=False, edgecolor="#555555")
                )
        arrows = [((14, 20), (19, heights[batch])) for batch in heights]
        arrows += [((36, y), (40, y)) for y in heights.values()]
        arrows += [((54, heights[batch]), (59, 20)) for batch in heights] + [
            ((72.5, 20), (76, 20)),
            ((87, 20), (92, 20)),
        ]
        for begin, end in arrows:
            axes.annotate("", end, begin, arrowprops={"arrowstyle": "->", "color": "#777777"})
        for x, note in (
            (28, "sorted by length,\nside by side, no padding"),
            (48, "the certain ones leave"),
            (70, "the rest is joined"),
        ):
            axes.text(x, 2.4, note, ha="center", va="center", color="#555555", fontsize=8)
        handles = [Rectangle((0, 0), 1, 1, color=COLOURS[depth]) for depth in range(3)]
        figure.legend(
            handles, [f"answered by exit {depth}" for depth in (1, 2, 3)], loc="outside lower center", ncols=3
        )
    return figure

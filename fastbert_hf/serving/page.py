"""
A page that shows what a speed gives and saves: type a text and move the speed, or give a file and see every speed.

```python
>>> show_page(load_pipeline("org/fastbert-chnsenticorp"))
```

Every text runs through all layers once; what a slider says is replayed from that, so moving it costs no pass of the
model. The page keeps of a visitor only what their own session holds, and fetches nothing from elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from ..modeling.pipeline_fastbert import FastTextClassificationPipeline
from .page_style import CSS


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio as gr
    import pyarrow  # noqa: F401 (that `page_files` has it)
except ImportError as error:
    raise ImportError('fastbert_hf.serving.page needs its extra: pip install "fastbert-hf[demo]"') from error

from .page_actions import EMPTY_FILE, EMPTY_TEXT, MOST_CHARACTERS, STOPPED, PageActions, Visit
from .page_figures import as_html, hints, notice
from .page_files import KINDS, MOST_BYTES, MOST_ROWS


# Sentences of film reviews, for the model of the package.
EXAMPLES = (
    "The plot is thin, but the cast makes it a joy.",
    "A masterpiece from the first frame to the last.",
    "It should have been a disaster, but it is a triumph.",
    "Too clever to be dull, too cold to be loved.",
    "Two hours of my life that I want back.",
)
OWN_MODEL = Path(__file__).parents[1] / "default_model"
# Seconds after which files of visitors are removed, and between two looks at them.
KEPT, LOOKED_AFTER = 3600, 600
# Visitors whose sessions are held at the same time, and calls that wait.
MOST_VISITORS, MOST_WAITING = 64, 32
# From light to dark, around the blue of the figures.
BLUE = "#eff7fc #d9ecf7 #b5d9ef #82bfe3 #439dd1 #0072b2 #0067a0 #005585 #00466e #003a5c #00263d"


def build_page(classifier: FastTextClassificationPipeline, examples: Sequence[str] | None = None) -> gr.Blocks:
    """
    Return the page of a pipeline, to show with [`show_page`], or to mount.

    Args:
        classifier ([`FastTextClassificationPipeline`]):
            From [`load_pipeline`]. Its dial is where the sliders begin. What else it is asked for must be in its
            model's config.
        examples (sequence of `str`, *optional*):
            Texts to try, of which the first one is answered when the page opens. Unless given, film reviews for the
            package's own model, and none for another.

    Raises:
        ValueError: If the pipeline is asked for something that the page cannot show.
    """
    actions, config = PageActions(classifier), classifier.model.config
    if examples is None:
        examples = EXAMPLES if _is_own(config) else ()
    with gr.Blocks(title="fastbert_hf", analytics_enabled=False, delete_cache=(LOOKED_AFTER, KEPT)) as page:
        visit = gr.State(Visit(), delete_callback=Visit.forget)
        gr.HTML(_title(config), apply_default_css=False)
        with gr.Tabs():
            with gr.Tab("One text", id="text"):
                _text_tab(page, actions, visit, examples)
            with gr.Tab("A file", id="file"):
                _file_tab(actions, visit)
    # One text and one file at a time run through the model; what is replayed does not wait for them.
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)


def show_page(
    classifier: FastTextClassificationPipeline,
    examples: Sequence[str] | None = None,
    host: str | None = None,
    port: int | None = None,
) -> gr.Blocks:
    """
    Show a page until the returned `Blocks` is closed.

    Args:
        classifier, examples: As in [`build_page`].
        host (`str`, *optional*):
            Address on which the page is served: 127.0.0.1, this machine alone, or what the environment variable
            `GRADIO_SERVER_NAME` says.
        port (`int`, *optional*): A free one from 7860 on unless given.
    """
    page = build_page(classifier, examples)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        max_file_size=MOST_BYTES,
        state_session_capacity=MOST_VISITORS,
        footer_links=["settings", "gradio"],
        theme=_theme(),
        # Given as css=, Gradio would rewrite the selectors.
        head=f"<style>{CSS}</style>",
    )
    return page


def _theme() -> gr.themes.Base:
    # Of the fonts that come with Gradio these two weights have all letters. None is fetched from elsewhere.
    fonts = [gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]
    blue = gr.themes.Color(*BLUE.split())
    theme = gr.themes.Default(primary_hue=blue, secondary_hue=blue, neutral_hue="slate", font=fonts)
    return theme.set(
        body_background_fill="#f7f9fb",
        body_background_fill_dark="#0d131b",
        block_background_fill_dark="#151c27",
        block_border_color="#d9dee6",
        block_border_color_dark="#333d4b",
        block_radius="12px",
        slider_color="#0072b2",
        slider_color_dark="#3a9ad9",
    )


def _is_own(config: PreTrainedConfig) -> bool:
    """Tell whether this is the model that comes with the package."""
    return bool(config._name_or_path) and Path(config._name_or_path).resolve() == OWN_MODEL


def _title(config: PreTrainedConfig) -> str:
    members = getattr(config, "members", None) or [config]
    name = str(config._name_or_path or "")
    # Nobody has to know where a folder lies.
    name = "the small model of the package" if _is_own(config) else Path(name).name if os.path.isdir(name) else name
    layers = " + ".join(str(member.num_hidden_layers) for member in members)
    labels = [config.id2label[number] for number in range(config.num_labels)]
    shown = ", ".join(as_html(label, 30) for label in labels[:5])
    more = "" if len(labels) <= 5 else f" and {len(labels) - 5} more labels"
    return (
        '<div class="fb fb-title"><h1>As many layers as a text needs</h1>'
        f"<p>{as_html(name, 80)}{' · ' if name else ''}{layers} layers · {shown}{more}</p></div>"
    )


def _dial_controls(actions: PageActions) -> list[gr.components.Component]:
    """Add a choice of the dials and a slider for each of them, of which one is shown."""
    first = actions.dials[0]
    choice = gr.Radio(
        [dial.title for dial in actions.dials],
        value=first.title,
        label="What to ask for",
        visible=len(actions.dials) > 1,
    )
    sliders = [
        gr.Slider(dial.minimum, dial.maximum, dial.value, step=dial.step, label=dial.label, visible=dial is first)
        for dial in actions.dials
    ]
    if actions.missing:
        gr.HTML(hints(actions.missing, "What is missing here, and why"), apply_default_css=False)
    choice.input(actions.show_dial, choice, sliders, queue=False, show_progress="hidden", api_visibility="private")
    return [choice, *sliders]


def _text_tab(page: gr.Blocks, actions: PageActions, visit: gr.State, examples: Sequence[str]) -> None:
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            text = gr.Textbox(
                examples[0] if examples else "",
                label="Text",
                lines=1,
                max_lines=10,
                max_length=MOST_CHARACTERS,
                placeholder="Type a text and press Enter",
                elem_id="fb-text",
            )
            with gr.Accordion("Second text of a pair", open=False):
                pair = gr.Textbox(
                    label="Second text",
                    show_label=False,
                    container=False,
                    max_lines=6,
                    max_length=MOST_CHARACTERS,
                    placeholder="Only for models of pairs",
                )
            cut = gr.Checkbox(label="Cut it to what the model reads", visible=False)
            button = gr.Button("Answer", variant="primary")
            controls = _dial_controls(actions)
            shown = gr.Examples([[example] for example in examples], [text], label="Try") if examples else None
        with gr.Column(scale=7, min_width=320):
            result = gr.HTML(notice(EMPTY_TEXT), elem_id="fb-result", apply_default_css=False)
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    inputs, outputs = [visit, text, pair, cut, *controls], [result, cut]
    triggers = [button.click, text.submit, pair.submit, cut.input, page.load]
    answered = [gr.on(triggers, actions.read_text, inputs, outputs, **quiet)]
    if shown is not None:
        answered.append(shown.load_input_event.then(actions.read_text, inputs, outputs, **quiet))
    for event in answered:
        event.success(actions.measure, visit, result, **quiet)
    for control in controls:
        # Only the last of many moves counts.
        moved = control.change(
            actions.move, [visit, *controls], result, queue=False, trigger_mode="always_last", **quiet
        )
        moved.success(actions.measure, visit, result, trigger_mode="always_last", **quiet)


def _file_tab(actions: PageActions, visit: gr.State) -> None:
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            file = gr.File(
                label=f"File: up to {MOST_ROWS:,} rows and {MOST_BYTES // 1_000_000} MB",
                file_types=list(KINDS),
                height=132,
                elem_id="fb-file",
            )
            with gr.Row():
                columns = [
                    gr.Dropdown([], label=label, interactive=False, min_width=110)
                    for label in ("Texts", "Second texts", "Labels")
                ]
            cut = gr.Checkbox(True, label="Cut texts that are too long for the model")
            with gr.Row():
                run = gr.Button("Answer all", variant="primary", interactive=False, min_width=120)
                stop = gr.Button("Stop", interactive=False, min_width=80)
            controls = _dial_controls(actions)
            download = gr.DownloadButton("Download the answers", interactive=False, elem_id="fb-download")
        with gr.Column(scale=7, min_width=320):
            result = gr.HTML(notice(EMPTY_FILE), elem_id="fb-file-result", apply_default_css=False)
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    file.change(actions.open_file, [visit, file], [*columns, run, download, result], **quiet)
    # While a file is answered it can be stopped, and no other one begun.
    busy = [gr.update(interactive=False), gr.update(interactive=True)]
    idle = busy[::-1]
    begun = run.click(lambda: busy, None, [run, stop], queue=False, **quiet)
    inputs = [visit, file, *columns, cut, *controls]
    answered = begun.then(actions.run_file, inputs, result, show_progress="minimal", api_visibility="private")
    answered.then(lambda: idle, None, [run, stop], queue=False, **quiet)
    answered.success(actions.write_answers, [visit, *controls], download, **quiet)
    stop.click(lambda: [*idle, notice(STOPPED)], None, [run, stop, result], cancels=answered, queue=False, **quiet)
    for control in controls:
        moved = control.change(
            actions.move_file, [visit, *controls], [result, download], queue=False, trigger_mode="always_last", **quiet
        )
        moved.success(actions.write_answers, [visit, *controls], download, trigger_mode="always_last", **quiet)

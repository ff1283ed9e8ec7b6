"""What the page does when its visitor does something: each method is called by an event of `page.py`."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from ..modeling.pipeline_fastbert import FastTextClassificationPipeline
from ..modeling.tasks import task_of
from .page_answers import ManyTexts, OneText, TooLong, joined_records, record_in_steps
from .page_dials import page_dials
from .page_figures import as_html, hints, many_texts_figure, notice, one_text_figure, progress, stacked, table
from .page_files import MOST_ROWS, UploadedRows, answered_csv, label_ids, likely_columns, read_upload


MOST_CHARACTERS = 20_000
EMPTY_TEXT = "Type a text and press Answer."
EMPTY_FILE = "Give a file with a text in each row: CSV or TSV with a header, JSON lines, or Parquet."
STOPPED = "Stopped. Nothing is kept of the answers so far."
NONE = "(none)"
# What is shown of a file, and of the rows without an answer.
SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_REASONS = 8, 6, 12


@dataclass
class AnsweredFile:
    """
    A file, and what the model says of its texts.

    Args:
        upload ([`UploadedRows`]): Its rows.
        columns (`list[str]`): Those of the texts, of second texts and of labels, as far as there are any.
        places (`list[int]`): The rows that have an answer.
        reasons (`dict[int, str]`): Why others have none.
        texts ([`ManyTexts`]): The answers at every speed.
        notes (`list[str]`): What a visitor has to know about them.
    """

    upload: UploadedRows
    columns: list[str]
    places: list[int]
    reasons: dict[int, str]
    texts: ManyTexts
    notes: list[str]


@dataclass
class Visit:
    """What the session of one visitor holds, and nobody else sees."""

    text: OneText | None = None
    asked: dict[str, float] = field(default_factory=dict)  # of the text, as it was shown last
    file: AnsweredFile | None = None
    folder: Path | None = None  # of the answers to download

    def forget(self) -> None:
        """Remove what was written for this visitor."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.text, self.file, self.folder = None, None, None


def friendly(action: Callable) -> Callable:
    """Return an action whose visitor is told what was wrong with what they gave, and nothing else."""

    @wraps(action)
    def told(*arguments, **named):
        try:
            return action(*arguments, **named)
        except ValueError as error:
            raise gr.Error(as_html(error, 400), print_exception=False) from None

    return told


def warned(message: str) -> str:
    """Return what stands in place of an answer, and call attention to it."""
    gr.Warning(as_html(message, 400))
    return notice(message)


class PageActions:
    """
    The actions of a page.

    Args:
        classifier ([`FastTextClassificationPipeline`]): Answers, for all visitors.
    """

    def __init__(self, classifier: FastTextClassificationPipeline):
        task = task_of(classifier.model.config).name
        if task != "single_label_classification":
            raise ValueError(f"the page shows models that give one label to each text, and this one is for {task}.")
        self.classifier = classifier
        self.dials, self.missing = page_dials(classifier)
        id2label = classifier.model.config.id2label
        self.label2id = {id2label[number]: number for number in range(len(id2label))}

    def asked(self, title: str, values: Sequence[Any]) -> dict[str, float]:
        """Return what the sliders ask for, as an argument of the pipeline: `{"speed": 0.5}`."""
        for dial, value in zip(self.dials, values, strict=True):
            if dial.title == title:
                return dial.asked(value)
        raise ValueError(f"{title!r:.40} is none of {', '.join(dial.title for dial in self.dials)}.")

    def in_words(self, title: str, asked: Mapping[str, float]) -> str:
        """Return what a call asks for as a visitor reads it."""
        ((name, value),) = asked.items()
        return f"at most {100 * value:g} % differ" if name == "max_disagreement" else f"{title.lower()} {value:g}"

    def show_dial(self, title: str) -> list[Any]:
        """Show the slider that was chosen."""
        return [gr.update(visible=dial.title == title) for dial in self.dials]

    def read_text(
        self, visit: Visit, text: Any, text_pair: Any, cut: bool, title: str, *values: Any
    ) -> tuple[Any, Any]:
        """Run a text through every layer, and show its answer. Offer to cut one that is too long."""
        text, text_pair = str(text or ""), str(text_pair or "").strip()
        offer, read, asked = gr.skip(), None, {}
        try:
            asked = self.asked(title, values)
            if (number := len(text) + len(text_pair)) > MOST_CHARACTERS:
                raise ValueError(f"This text has {number:,} characters, and the page takes {MOST_CHARACTERS:,}.")
            if text.strip():
                read = OneText(self.classifier, text, text_pair or None, bool(cut))
            shown = notice(EMPTY_TEXT) if read is None else one_text_figure(read, asked)
        except TooLong as error:
            shown = warned(f"This text has {error}. Tick “Cut it” to read its beginning.")
            offer = gr.update(visible=True)
        except ValueError as error:
            shown = warned(str(error))
        visit.text, visit.asked = read, asked
        return shown, offer

    @friendly
    def move(self, visit: Visit, title: str, *values: Any) -> Any:
        """Show the answer at another setting, without the model."""
        if visit.text is None:
            return notice(EMPTY_TEXT)
        visit.asked = self.asked(title, values)
        return one_text_figure(visit.text, visit.asked)

    @friendly
    def measure(self, visit: Visit) -> Any:
        """Measure how long the answer takes as it is shown, unless that is known."""
        text, asked = visit.text, visit.asked
        path = None if text is None else text.answer(**asked).path
        if path is None or path in text.seconds:
            return gr.skip()
        text.measure(path, **asked)
        # The visitor may have gone on meanwhile.
        return one_text_figure(text, visit.asked) if visit.text is text else gr.skip()

    def open_file(self, visit: Visit, path: Any) -> list[Any]:
        """Show the first rows of a file, and choose its columns: of texts, second texts and labels."""
        visit.file = None
        closed = gr.update(interactive=False)
        nothing = [gr.update(choices=[], value=None, interactive=False)] * 3
        if not path:
            return [*nothing, closed, closed, notice(EMPTY_FILE)]
        try:
            upload = read_upload(path)
        except ValueError as error:
            return [*nothing, closed, closed, warned(str(error))]
        columns, (text, pair, label) = upload.columns, likely_columns(upload)
        rows = [[row.get(name) for name in columns[:SHOWN_COLUMNS]] for row in upload.rows[:SHOWN_ROWS]]
        return [
            gr.update(choices=columns, value=text, interactive=True),
            gr.update(choices=[NONE, *columns], value=pair or NONE, interactive=True),
            gr.update(choices=[NONE, *columns], value=label or NONE, interactive=True),
            gr.update(interactive=True),
            closed,
            stacked([table(columns[:SHOWN_COLUMNS], rows, f"The first of {len(upload.rows):,} rows")]),
        ]

    def run_file(
        self, visit: Visit, path: Any, text: Any, pair: Any, label: Any, cut: bool, title: str, *values: Any
    ) -> Iterator[str]:
        """Run the texts of a file through every layer, and show what every speed gives."""
        visit.file = None
        try:
            if not path:
                raise ValueError(EMPTY_FILE)
            asked, upload = self.asked(title, values), read_upload(path)
            columns = [name for name in (text, pair, label) if name != NONE]
            missing = next((name for name in columns if name not in upload.columns), None)
            if missing is not None or text == NONE:
                raise ValueError(f"This file has no column {text if missing is None else missing!r}.")
            visit.file = yield from self._answered(upload, columns, text, pair, label, bool(cut))
            yield self.file_figure(visit.file, title, asked)
        except ValueError as error:
            yield warned(str(error))

    def _answered(
        self, upload: UploadedRows, columns: list[str], text: str, pair: str, label: str, cut: bool
    ) -> Generator[str, None, AnsweredFile]:
        """Yield how far a file is, and return it with its answers."""
        texts, places, reasons = upload.texts(text, *([] if pair == NONE else [pair]))
        records, unread = [], {}
        yield progress(0, len(texts))
        for done, record, errors in record_in_steps(self.classifier, texts, cut):
            records += [] if record is None else [record]
            unread.update(errors)
            yield progress(done, len(texts))  # where it can be stopped
        reasons |= {places[number]: str(error) for number, error in unread.items()}
        places = [place for number, place in enumerate(places) if number not in unread]
        if not places:
            raise ValueError(f"No row of this file can be answered: the first {reasons[min(reasons)]}.")
        labels, notes = None, []
        if label != NONE:
            labels = label_ids([upload.rows[place].get(label) for place in places], self.label2id)
            if (unknown := labels.count(-1)) == len(labels):
                notes.append(f"None of the labels in {label!r} is one of the model's, so there is no accuracy.")
            elif unknown:
                notes.append(f"{unknown:,} rows have no label that the model knows: they do not count for accuracy.")
        if upload.is_cut:
            notes.append(f"The page reads the first {MOST_ROWS:,} rows. For more there is fastbert-hf score.")
        return AnsweredFile(
            upload, columns, places, reasons, ManyTexts(self.classifier, joined_records(records), labels), notes
        )

    @friendly
    def move_file(self, visit: Visit, title: str, *values: Any) -> tuple[Any, Any]:
        """Show what another setting gives on the file, without the model. Its answers are to be written anew."""
        if visit.file is None:
            return gr.skip(), gr.skip()
        return self.file_figure(visit.file, title, self.asked(title, values)), gr.update(interactive=False)

    def file_figure(self, file: AnsweredFile, title: str, asked: Mapping[str, float]) -> str:
        """Return all that the page says of a file where a call asks for this."""
        replayed = file.texts.at(**asked)
        answers = file.texts.answers(replayed)
        names = ["row", *file.columns, "answer", "score", "layers"]
        rows = [
            [place + 1, *(file.upload.rows[place].get(name) for name in file.columns), *_shown(answer)]
            for place, answer in zip(file.places[:SHOWN_ROWS], answers, strict=False)
        ]
        figure = many_texts_figure(
            file.texts.summary_of(replayed),
            file.texts.curve,
            file.texts.speed_of(**asked),
            self.in_words(title, asked),
            file.texts.record.member_layers,
        )
        parts = [figure, hints(file.notes), table(names, rows, "The first answers")]
        if file.reasons:
            bad = [[place + 1, reason] for place, reason in sorted(file.reasons.items())[:SHOWN_REASONS]]
            more = f"{len(file.reasons):,} row{'s' * (len(file.reasons) > 1)} without an answer"
            caption = more if len(bad) == len(file.reasons) else f"{more}, the first {len(bad)} of them"
            parts.append(table(["row", "why"], bad, caption))
        return stacked(parts)

    @friendly
    def write_answers(self, visit: Visit, title: str, *values: Any) -> Any:
        """Write the answers to all rows for download, in place of those written before."""
        if visit.file is None:
            return gr.update(value=None, interactive=False)
        asked, file = self.asked(title, values), visit.file
        answers = file.texts.answers(file.texts.at(**asked))
        ((name, value),) = asked.items()
        # Where Gradio keeps files of its own: this one is served from there and goes when they go.
        folder = Path(get_upload_folder(), f"answers_{secrets.token_hex(16)}")
        folder.mkdir(parents=True)
        written = folder / f"answers_{name}_{value:g}.csv"
        content = answered_csv(file.upload, file.places, answers, file.reasons)
        written.write_text(content, encoding="utf-8")
        if visit.folder is not None:
            shutil.rmtree(visit.folder, ignore_errors=True)
        visit.folder = folder
        return gr.update(value=str(written), interactive=True)


def _shown(answer: Mapping[str, Any]) -> list[str]:
    return [answer["label"], f"{answer['score']:.3f}", str(answer["exit_layer"])]

"""Show in the browser what each speed gives and saves: `fastbert-hf demo`."""

from __future__ import annotations

import argparse

from ..modeling.dials import DIALS
from .options import check_at_least_one, one_line_errors
from .serve import check_port


def run(options: argparse.Namespace) -> None:
    """Show the page of a model until Ctrl-C."""
    check_at_least_one(options, "max_length")
    with one_line_errors(kinds=(ValueError, OSError, ImportError)):
        from ..serving.loading import load_pipeline
        from ..serving.page import show_page

        check_port(options.host, options.port)
        reading = {"truncate": options.truncate, "max_length": options.max_length}
        dial = {name: getattr(options, name) for name in DIALS}
        classifier = load_pipeline(options.model, options.int8, **reading, **dial)
        page = show_page(classifier, options.examples, options.host, options.port)
    print(f"The page is at {page.local_url} until Ctrl-C.", flush=True)
    page.block_thread()

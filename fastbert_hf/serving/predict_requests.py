"""
What a server is asked over HTTP and what it says, as Text Embeddings Inference has it
(https://huggingface.github.io/text-embeddings-inference), so that its clients work, with a dial for each request.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ..modeling.dials import DIALS


try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
except ImportError as error:
    raise ImportError('the server needs its extra: pip install "fastbert-hf[ray]"') from error


Pair = Annotated[list[str], Field(min_length=1, max_length=2)]


class Refused(Exception):
    """
    A request that gets an error instead of answers.

    Args:
        status (`int`): Of HTTP.
        error_type (`str`): Of [`ErrorResponse`].
        message (`str`): What was given, what is allowed, and how it is asked rightly.
        headers: Of the response, such as `Retry_After=1`.
    """

    def __init__(self, status: int, error_type: str, message: str, **headers: Any):
        super().__init__(message)
        self.status, self.error_type = status, error_type
        self.headers = {name.replace("_", "-"): str(value) for name, value in headers.items()}


class PredictRequest(BaseModel):
    """The body of `POST /predict`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: str | Pair | list[Pair] = Field(
        description='A text, a pair ["text", "second text"], or many as [["text"], ["text", "second text"], ...].',
        examples=["I would go there again."],
    )
    truncate: bool | None = Field(False, description="Cut texts that are too long, instead of refusing them.")
    truncation_direction: Literal["Right", "right", "Left", "left"] = Field("Right", description="Where they are cut.")
    raw_scores: bool = Field(False, description="Logits in place of probabilities.")
    top_k: int | None = Field(None, ge=1, description="Only so many of the labels; all of them unless given.")
    speed: float | None = Field(
        None, allow_inf_nan=False, description="From 0, every layer, to 1; follows the load unless given."
    )
    speedup: float | None = Field(
        None, allow_inf_nan=False, description="In place of it: so many times cheaper than at speed 0, on average."
    )
    max_disagreement: float | None = Field(
        None, allow_inf_nan=False, description="In place of both: the share of answers that may differ from speed 0."
    )

    def dial(self) -> tuple[str, float] | None:
        """Return what is asked for by name and value, or `None`."""
        found = [(name, getattr(self, name)) for name in DIALS if getattr(self, name) is not None]
        if len(found) > 1:
            raise Refused(422, "Validation", f"give {' or '.join(name for name, _ in found)}, not both")
        return found[0] if found else None

    def texts(self) -> list[Any]:
        """Return the texts and pairs as the pipeline takes them."""
        return [text_of(one) for one in (self.inputs if self.has_many() else [self.inputs])]

    def has_many(self) -> bool:
        """Tell whether these are many texts, whose answers are a list for each."""
        return isinstance(self.inputs, list) and (not self.inputs or isinstance(self.inputs[0], list))


class Label(BaseModel):
    """A label, how probable it is, and the layer after which the text was answered."""

    label: str
    score: float
    exit_layer: int


class ErrorResponse(BaseModel):
    """Why there is no answer."""

    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer"]


class Info(BaseModel):
    """What `GET /info` tells."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    num_layers: int
    speed: float
    max_speed: float
    slo_ms: float
    dials: dict[str, str | None] = Field(description="What a request may ask for, with the reason where it may not.")
    reload_error: str | None = Field(description="Why the newest settings are not in use; the last ones are.")


def text_of(one: str | list[str]) -> str | dict[str, str]:
    """Return a text or a pair as the pipeline takes it."""
    if isinstance(one, str):
        return one
    return one[0] if len(one) == 1 else {"text": one[0], "text_pair": one[1]}


def read_request(body: bytes) -> PredictRequest:
    """
    Return what a body asks for.

    Raises:
        Refused: If it is no JSON, or asks for what there is not.
    """
    try:
        return PredictRequest.model_validate_json(body)
    except ValidationError as error:
        raise Refused(422, "Validation", what_is_wrong(error)) from None


def what_is_wrong(error: ValidationError) -> str:
    """Return in one line what a request should have been."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name, reason = first["loc"][0] if first["loc"] else None, first["msg"]
    if name == "inputs":
        return (
            'inputs must be a text, a pair ["text", "second text"], or many as [["text"], ["text", "second text"]]: '
            '{"inputs": [["Fine."], ["Nobody answered."]]}'
        )
    if name is None:
        return f'the body must be JSON such as {{"inputs": "I would go there again."}}: {reason}'
    if first["type"] == "extra_forbidden":
        known = ", ".join(PredictRequest.model_fields)
        return f"there is no field {str(name)[:40]!r}: the fields are {known}"
    return f"{name}: {reason}"

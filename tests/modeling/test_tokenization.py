"""Tokenizers that threads share, what their calls take, and those that cannot be the model's."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import BertTokenizer, PreTrainedTokenizer, pipeline

from fastbert_hf import (
    DEFAULT_MODEL_DIR,
    CascadeForSequenceClassification,
    CascadeProcessor,
    FastBertForSequenceClassification,
    save_with_code,
)
from fastbert_hf.modeling.processing_cascade import check_tokenizer
from fastbert_hf.modeling.tokenization import call_arguments, call_tokenizer, check_vocabulary

from ..common import VOCAB_SIZE, other_tokenizer, stock, tiny_model, tiny_text_config, tiny_texts, tiny_tokenizer


class SlowToSet(BertTokenizer):
    """Gives other threads time between setting what a call asks for and encoding with it."""

    def set_truncation_and_padding(self, *args, **kwargs):
        super().set_truncation_and_padding(*args, **kwargs)
        time.sleep(0.02)


class PerLetter(PreTrainedTokenizer):
    """A tokenizer in Python, as some families have it, whose call takes a keyword of its own."""

    def __init__(self, **kwargs):
        self.ids = {letter: index for index, letter in enumerate("?abcdefghijklmnopqrstuvwxyz")}
        super().__init__(unk_token="?", pad_token="?", **kwargs)

    vocab_size = property(lambda self: len(self.ids))

    def get_vocab(self):
        return dict(self.ids)

    def _tokenize(self, text, **kwargs):
        return list(text.replace(" ", ""))

    def _convert_token_to_id(self, token):
        return self.ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return list(self.ids)[index]

    def prepare_for_tokenization(self, text, is_split_into_words=False, shout=False, **kwargs):
        return (text[::-1] if shout else text), kwargs


def slow_to_set() -> SlowToSet:
    return SlowToSet(vocab=tiny_tokenizer().get_vocab(), model_max_length=64)


# Threads


def test_threads_that_ask_for_other_lengths_get_their_own():
    tokenizer, text = slow_to_set(), "word7 " * 30
    small, large = (
        pipeline("fast-text-classification", model=model, tokenizer=tokenizer)
        for model in (tiny_model(seed=1), tiny_model(seed=2))
    )
    processor = CascadeProcessor([tokenizer])
    lengths = [5, 9, 17, 25] * 2

    def ask(length: int) -> tuple:
        cut = {"truncation": True, "max_length": length}
        of_processor = processor([text], **cut)[0]["input_ids"]
        return len(of_processor), small(text, **cut), large(text, **cut)

    with ThreadPoolExecutor(len(lengths)) as pool:
        answers = list(pool.map(ask, lengths))
    assert [answer[0] for answer in answers] == lengths
    for length, (_, of_small, of_large) in zip(lengths, answers, strict=True):
        _, small_alone, large_alone = ask(length)
        assert of_small == small_alone and of_large == large_alone
    assert len({str(answer[1]) for answer in answers}) == 4


def test_tokenizers_are_copied_and_pickled_as_ever():
    tokenizer = tiny_tokenizer()
    expected = call_tokenizer(tokenizer, ["word7 word8"])["input_ids"]
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer)), copy.copy(tokenizer)):
        assert call_tokenizer(copied, ["word7 word8"])["input_ids"] == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_that_is_forked_amid_a_call_can_call():
    tokenizer, is_inside, may_end = tiny_tokenizer(), threading.Event(), threading.Event()
    encode = tokenizer._encode_plus

    def wait_inside(*args, **kwargs):
        is_inside.set()
        may_end.wait(30)
        return encode(*args, **kwargs)

    tokenizer._encode_plus = wait_inside
    thread = threading.Thread(target=call_tokenizer, args=(tokenizer, ["word7"]))
    thread.start()
    assert is_inside.wait(30)
    child = os.fork()
    if child == 0:
        may_end.set()
        os._exit(0 if len(call_tokenizer(tokenizer, ["word7"])["input_ids"][0]) == 3 else 1)
    end = time.monotonic() + 20
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    if found == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    may_end.set()
    thread.join()
    assert found == (child, 0)


# Whose tokenizer it is


def text_config(vocab_size: int):
    config = tiny_text_config("bert")
    config.vocab_size = vocab_size
    return config


def with_added(*tokens: str) -> BertTokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.mark.parametrize(
    ("make", "vocab_size"),
    [
        (tiny_tokenizer, VOCAB_SIZE),
        (tiny_tokenizer, 128),  # padded to a multiple
        (tiny_tokenizer, VOCAB_SIZE + 1024),
        (lambda: with_added("more", "tokens"), VOCAB_SIZE),  # of no text here
        (lambda: with_added("more", "tokens"), VOCAB_SIZE + 2),
        (PerLetter, 27),
    ],
)
def test_tokenizers_that_may_be_the_models(make, vocab_size):
    check_vocabulary(make(), text_config(vocab_size))


@pytest.mark.parametrize(
    ("make", "vocab_size", "message"),
    [
        (BertTokenizer, 100, r"it has 5 tokens, all of them special ones, and the model a vocabulary of 100\."),
        (BertTokenizer, 30522, r"it has 5 tokens, all of them special ones, and the model a vocabulary of 30,522\."),
        (tiny_tokenizer, 1125, "it has 100 tokens, and the model a vocabulary of 1,125. A file may be missing"),
        (tiny_tokenizer, 99, r"BertTokenizer is not the model's: it has 100 tokens, .* give it as tokenizer=\.\.\."),
        (PerLetter, 26, "PerLetter is not the model's: it has 27 tokens"),
        # Both stand in every text, beyond the last row of the model.
        (
            lambda: PerLetter(cls_token="[CLS]", sep_token="[SEP]"),
            27,
            r"it has 2[79] tokens, \[(SEP|CLS)\], \[(CLS|SEP)\] not among those of the model",
        ),
    ],
)
def test_tokenizers_that_cannot_be_the_models(make, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        check_vocabulary(make(), text_config(vocab_size))


def test_a_file_that_is_missing_is_an_error_not_a_wrong_answer(tmp_path):
    shutil.copytree(DEFAULT_MODEL_DIR, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"is not the model's: it has 5 tokens.*missing, such as tokenizer\.json"):
        pipeline("fast-text-classification", model=str(tmp_path))


def test_a_wrong_tokenizer_is_saved_beside_no_model(tmp_path):
    with pytest.raises(ValueError, match="BertTokenizer is not the model's"):
        save_with_code(tiny_model(), tmp_path / "folder", tokenizer=BertTokenizer())
    assert not (tmp_path / "folder").exists()


def test_members_are_checked_one_by_one():
    members = [stock("bert", 1, 1), stock("bert", 2, 2)]
    shared = CascadeForSequenceClassification.from_members(members)
    own = CascadeForSequenceClassification.from_members(members, tokenizers=[tiny_tokenizer(), other_tokenizer()])
    check_tokenizer(shared, tiny_tokenizer())
    check_tokenizer(shared, CascadeProcessor([tiny_tokenizer()]))
    check_tokenizer(own, own.processor)
    with pytest.raises(ValueError, match="BertTokenizer is not the model's"):
        check_tokenizer(own, CascadeProcessor([tiny_tokenizer(), BertTokenizer()]))
    for model in (shared, tiny_model()):
        with pytest.raises(ValueError, match="this model reads what one tokenizer makes of a text, not 2"):
            check_tokenizer(model, own.processor)


# What a call takes


def test_the_call_of_a_tokenizer_names_its_keywords():
    names = call_arguments(BertTokenizer)
    assert {"truncation", "max_length", "add_special_tokens", "split_special_tokens", "text_pair"} <= names
    assert not {"self", "text", "kwargs", "text_target", "padding_strategy", "speed"} & names
    assert "shout" not in names and "shout" in call_arguments(PerLetter)


def test_a_tokenizer_in_python_serves_the_pipeline(tmp_path):
    classifier = pipeline("fast-text-classification", model=tiny_model(), tokenizer=PerLetter())
    assert classifier(["abc", "c b a", "zz"]) != classifier(["abc", "c b a", "zz"], shout=True)
    assert classifier("abc", shout=True) == classifier("cba")
    with pytest.raises(TypeError, match=r"unexpected shoot \(did you mean shout\?\)"):
        classifier("abc", shoot=True)


def test_the_default_model_has_its_tokenizer():
    model = FastBertForSequenceClassification.from_pretrained(DEFAULT_MODEL_DIR)
    assert Path(model.name_or_path) == DEFAULT_MODEL_DIR
    texts = tiny_texts(3)
    assert pipeline("fast-text-classification", model=model)(texts) == pipeline("fast-text-classification")(texts)

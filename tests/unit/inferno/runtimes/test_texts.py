"""Long texts are cut before they are tokenised, where that changes no token that a model reads."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel, PreTokenizer

from inferno.runtimes.texts import head

WORDS = ["[UNK]", "a", "b", "##a", "##b", "!", "hello", "##s"]


def tokenizer(splitter: PreTokenizer, most: int | None, direction: str = "right") -> Tokenizer:
    made = Tokenizer(WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = splitter
    if most is not None:
        made.enable_truncation(most, direction=direction)
    return made


def byte_pairs(most: int) -> Tokenizer:
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {letter: n for n, letter in enumerate([*letters, "ab", "aba"])}
    made = Tokenizer(BPE(vocabulary, [("a", "b"), ("ab", "a")]))
    made.pre_tokenizer = ByteLevel()
    made.enable_truncation(most)
    return made


TOKENIZERS = [tokenizer(BertPreTokenizer(), 5), byte_pairs(5)]
PARTS = st.sampled_from(["a", "ab", "hellos", " ", "    ", "!", "b" * 60, "é", "🙂", "漢字", "\n"])


@pytest.mark.parametrize("words", TOKENIZERS)
@given(parts=st.lists(PARTS, min_size=100, max_size=200))
def test_the_first_tokens_are_the_same(words: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    assert words.encode(head(text, words, 5)).ids == words.encode(text).ids


@pytest.mark.parametrize("words", TOKENIZERS)
def test_a_megabyte_of_words_is_cut(words: Tokenizer) -> None:
    began = time.process_time()
    assert len(head("ab hello! " * 100_000, words, 5)) == 80
    assert time.process_time() - began < 0.05


def test_a_tokenizer_that_does_not_cut_off_itself_will_do() -> None:
    words = tokenizer(BertPreTokenizer(), None)
    assert len(head("hello! " * 100_000, words, 5)) == 80


def test_texts_stay_whole_where_it_cannot_be_told() -> None:
    words = tokenizer(BertPreTokenizer(), 5)
    for text in ("a b a", "a" * 1000, " " * 1000, "a " + "b" * 1000):
        assert head(text, words, 5) == text
    last = tokenizer(BertPreTokenizer(), 5, direction="left")
    assert head("a b " * 1000, last, 5) == "a b " * 1000

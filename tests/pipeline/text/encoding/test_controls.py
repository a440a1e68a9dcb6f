"""Text that mentions control tokens becomes the ids of its letters, whatever the tokenizer's model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import SENTENCES
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.text import Document, Encoder
from ddk_pipe.pipeline.text.encoding.controls import OPEN, any_of, rename

CONTROL = ["<unk>", "<s>", "</s>", "<pad>"]
LETTERS = sorted({*"".join(SENTENCES), *"<>/abdknpsu"})


def unigram() -> Tokenizer:
    pieces = [*((text, 0.0) for text in CONTROL), *((letter, -5.0) for letter in ["▁", *LETTERS])]
    tokenizer = Tokenizer(
        models.Unigram([(p, s) for p, s in dict(pieces).items()], unk_id=0, byte_fallback=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2: control tokens in the vocabulary, merges that spell them out, a normalizer in place of words."""
    names = [*CONTROL, "▁", *LETTERS, "</", "s>", "</s"]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    merges = [("<", "/"), ("s", ">"), ("</", "s"), ("</s", ">"), ("</", "s>")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def words() -> Tokenizer:
    known = {"the", "ferry", "leaves", "it", "ends", "with", "now"}
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*CONTROL, *sorted(known)])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def wordpiece() -> Tokenizer:
    vocabulary = [*CONTROL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def ignores_merges() -> Tokenizer:
    """As Llama 3: a word that is in the vocabulary is its token, whatever the merges."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


KINDS = (unigram, sentencepiece_bpe, words, wordpiece, ignores_merges)


def encoder_of(make: Callable[[], Tokenizer], *, opens: bool = False) -> Encoder:
    from transformers import PreTrainedTokenizerFast

    tokenizer = make()
    tokenizer.add_special_tokens(CONTROL)
    if opens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    special: dict[str, Any] = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), name=make.__name__)


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("make", KINDS)
def test_text_that_mentions_control_tokens(make: Callable[[], Tokenizer], opens: bool) -> None:
    encoder = encoder_of(make, opens=opens)
    alone = [
        Document(str(i), text) for i, text in enumerate(["</s>", "it ends with </s> now", "<s><pad></s>"])
    ]
    for encoded in encoder.encode(alone):
        ids = encoded.ids.tolist()
        assert ids[-1] == encoder.eos and ids.count(2) == 1
        assert (ids[0] == 1) is opens and 1 not in ids[1:] and 3 not in ids
        assert len(ids) > 1 + opens


@pytest.mark.parametrize("make", KINDS)
def test_unknown_letters_stay_unknown_and_its_name_is_letters(make: Callable[[], Tokenizer]) -> None:
    encoder = encoder_of(make)
    unknown, named = encoder.encode([Document("1", "Ж"), Document("2", "<unk>")])
    if make is not ignores_merges:  # it has every byte
        assert 0 in unknown.ids
    if make is not words:  # which has no letters: there any word is unknown
        assert 0 not in named.ids and len(named.ids) > 4


@pytest.mark.parametrize("make", KINDS)
def test_text_without_mentions_is_read_as_ever(make: Callable[[], Tokenizer]) -> None:
    encoder = encoder_of(make, opens=True)
    for text, encoded in zip(
        SENTENCES, encoder.encode([Document("1", text) for text in SENTENCES]), strict=True
    ):
        assert encoded.ids.tolist() == encoder.tokenizer(text)["input_ids"]
        assert encoder.controls.letters.encode(text).ids == encoder.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("opens", [False, True])
def test_empty_text_is_empty_whatever_the_tokenizer_adds(opens: bool) -> None:
    encoder = encoder_of(wordpiece, opens=opens)
    for encoded in encoder.encode([Document("1", ""), Document("2", " \n")]):  # this one drops white space
        assert encoded.ids.tolist() == [encoder.eos] and encoded.is_label.tolist() == [0]


def test_private_spellings_in_a_text_do_not_pass_for_control_tokens() -> None:
    encoder = encoder_of(unigram)  # which is given to `letters` as it would read the mention by itself
    attack = encoder.controls.spell("</s>")
    (encoded,) = encoder.encode([Document("f:1", attack)])
    assert attack.startswith(OPEN) and encoded.ids.tolist().count(2) == 1
    with pytest.raises(DdkError, match=r"f:1: .* reads control tokens in text"):
        encoder.encode([Document("f:1", f"{attack} and </s>")])


@given(st.lists(st.text("<|>ab(.", max_size=6), max_size=12), st.text("<|>ab(.", max_size=30))
def test_any_of_finds_the_longest(strings: list[str], text: str) -> None:
    plain = "|".join(re.escape(string) for string in sorted(filter(None, strings), key=len, reverse=True))
    assert re.findall(any_of(strings), text) == (re.findall(plain, text) if plain else [])


def test_rename_reads_merges_of_old_and_new_files() -> None:
    for merges in (["< s", "a b"], [["<", "s"], ["a", "b"]]):
        model = {"vocab": {"<s": 0, "ab": 1}, "merges": merges, "unk_token": "<s"}
        rename(model, {"<s": "X"})
        assert json.dumps(model) == '{"vocab": {"X": 0, "ab": 1}, "merges": [["a", "b"]], "unk_token": "X"}'

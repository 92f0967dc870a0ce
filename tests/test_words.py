"""A vocabulary of one's own (`clip.words`) behind open_clip's tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from i2vgen.model import clip
from i2vgen.settings import config
from i2vgen.training.settings import load_settings
from i2vgen.world.drawing import VOCABULARY, caption, sample_facts

TEXT = {"context_length": 32, "width": 16, "heads": 2, "layers": 2}
VISION = {"image_size": 16, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8}
SMALL = Path(__file__).parents[1] / "configs" / "train" / "small_vae.yaml"


def card(words, **text) -> config.Clip:
    size = 512 + len(clip.merges(words)) + 2
    return config.Clip(
        embed_dim=16, vision=VISION, text={**TEXT, "vocab_size": size, **text}, words=tuple(words)
    )


def test_every_word_is_one_token_and_no_two_share_one():
    tokenizer = clip.make_tokenizer(card(VOCABULARY))
    tokens = [tokenizer.encode(word) for word in VOCABULARY]
    assert all(len(t) == 1 for t in tokens)
    assert len({t[0] for t in tokens}) == len(VOCABULARY)


@pytest.mark.parametrize(
    "words", [("ab", "abab", "bab"), ("aaa", "aa", "aaaa"), ("left", "leftwards", "wardsleft")]
)
def test_words_inside_words_do_not_disturb_each_other(words):
    for order in (words, words[::-1]):
        tokenizer = clip.make_tokenizer(card(order))
        assert [len(tokenizer.encode(word)) for word in order] == [1, 1, 1]


def test_other_text_is_spelt_out_and_comes_back():
    tokenizer = clip.make_tokenizer(card(VOCABULARY))
    text = "a zebra, 3 times, sails to the left! über"
    assert tokenizer.decode(tokenizer.encode(text)).split() == [
        "a",
        "zebra",
        ",",
        "3",
        "times",
        ",",
        "sails",
        "to",
        "the",
        "left",
        "!",
        "über",
    ]


def test_captions_fit_the_shipped_text_length():
    shipped = load_settings(SMALL)[0].clip
    made = clip.ClipEncoders(shipped)
    assert shipped.words == tuple(VOCABULARY)
    assert made.tokenizer.vocab_size == shipped.text["vocab_size"]  # not one row too many
    captions = [caption(sample_facts(seed), seed) for seed in range(300)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a caption that is cut
        tokens = made.tokenize(captions)
    assert tokens.shape == (300, shipped.text["context_length"])
    assert torch.equal(tokens[:, 0], torch.full((300,), made.tokenizer.sot_token_id))


def test_a_table_smaller_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 600"):
        clip.ClipEncoders(card(VOCABULARY, vocab_size=600))


@pytest.mark.parametrize("word", ["Red", "to-the", "", "ü", "a b"])
def test_what_is_no_plain_word_is_refused(word):
    with pytest.raises(ValueError, match="letters a to z only"):
        config.Clip(words=("red", word))


def test_words_and_tokenizer_options_do_not_go_together():
    with pytest.raises(ValueError, match=r"clip\.words and clip\.text\.tokenizer_kwargs"):
        config.Clip(words=("red",), text={**TEXT, "vocab_size": 600, "tokenizer_kwargs": {"clean": "lower"}})


def test_export_hands_the_vocabulary_on(tmp_path):
    transformers = pytest.importorskip("transformers")
    from weights_conversion.diffusers_configs import write_tokenizer

    own = card(VOCABULARY)
    write_tokenizer(tmp_path, own)
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    ours = clip.make_tokenizer(own)
    for seed in range(20):
        text = caption(sample_facts(seed), seed)
        assert theirs(text)["input_ids"][1:-1] == ours.encode(text)

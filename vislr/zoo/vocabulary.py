"""A CLIP tokenizer whose vocabulary is the words of the embedded captions, one token a word.

CLIP's byte-pair merges are applied by rank wherever they match, so merges of word beginnings can
fire in the middle of other words. Merges of word *endings* cannot: only one piece of a word holds
the end mark, hence exactly one merge applies at a time and every known word becomes one token.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vislr.core.errors import DataError, hint

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_TOKENS = 16
# Words of scenes and held-out styles, so that adapters and later data need no new vocabulary.
EXTRA_WORDS = """
    noto twemoji fluent outline pixel sepia halftone style picture of the a an and with in on at left right centre
    top bottom above below beside large small big little one two three many single pair ground background plain
    gradient striped dotted checkered zigzag starry wavy noisy grid red orange yellow green blue purple pink brown
    grey black white dark light teal navy gold silver cream violet turquoise coral olive day night sky sea sand
    snow grass wood stone brick paper space new old my sks photo drawing icon sticker emoji face animal food object
    person place vehicle plant
"""


def words_of(text: str) -> list[str]:
    """The words and marks that CLIP's own pre-tokenizer cuts a plain caption into."""
    return re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower())


def build_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A `CLIPTokenizer` of `MAX_TOKENS` positions with every word of `captions` as one token."""
    from transformers import CLIPTokenizer

    words = sorted({w for text in captions for w in words_of(text)} | set(EXTRA_WORDS.split()))
    single = sorted(set(string.ascii_lowercase + string.digits + ",.-'!?&") | {c for w in words for c in w})
    tokens = single + [f"{c}</w>" for c in single]
    merges: Any = []
    known = set(tokens)
    for word in words:
        ending = f"{word[-1]}</w>"
        for letter in reversed(word[:-1]):
            longer = letter + ending
            if longer not in known:
                known.add(longer)
                tokens.append(longer)
                merges.append((letter, ending))
            ending = longer
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_TOKENS,
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def check_words(tokenizer: CLIPTokenizer, text: str) -> None:
    """Refuse a caption that this tokenizer would cut into letters or cut off.

    An unknown word becomes pieces (or the end mark) without a sign, and the picture then follows
    something that nobody wrote. Only for the embedded vocabulary; CLIP's own knows every word.

    Raises:
        DataError: a word is unknown, or the caption has too many.
    """
    vocabulary = tokenizer.get_vocab()
    words = words_of(text)
    known = [token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>") and len(token) > 6]
    for word in words:
        if f"{word}</w>" not in vocabulary:
            raise DataError(f"the embedded models do not know the word '{word}'{hint(word, known)}")
    if len(words) > tokenizer.model_max_length - 2:
        raise DataError(f"{len(words)} words; the embedded models read {tokenizer.model_max_length - 2}: '{text}'")

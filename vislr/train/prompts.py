"""Captions and prompts that a model cannot read, found before any work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vislr.core.errors import DataError


def check_prompts(pipe: Any, texts: Iterable[tuple[str, str]]) -> None:
    """Refuse words that an embedded pipeline does not know; other tokenizers know every word.

    Args:
        pipe: any pipeline.
        texts: (where it stands, caption or prompt).

    Raises:
        DataError: names the first such text, its place and the number of others.
    """
    from vislr.zoo.vocabulary import MAX_TOKENS, check_words

    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or tokenizer.model_max_length != MAX_TOKENS:
        return
    wrong: list[str] = []
    for where, text in texts:
        try:
            check_words(tokenizer, text)
        except DataError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        more = f" ({len(wrong) - 1} more such texts)" if len(wrong) > 1 else ""
        raise DataError(wrong[0] + more)

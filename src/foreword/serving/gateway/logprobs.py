"""Tokens as text, for log-probabilities."""

from __future__ import annotations

from typing import Any


class Vocabulary:
    """The text of single tokens.

    A token is decoded behind another one: some tokenizers drop the space in front of a text's first word.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        found = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._anchor: list[int] = list(found[:1])
        self._before: str = self._decode(self._anchor)

    def text(self, token: int) -> str:
        """The token's text; U+FFFD stands for bytes that are no whole character. The end token: its name."""
        known = self._texts.get(token)
        if known is None:
            known = self._texts[token] = self._decode([*self._anchor, token]).removeprefix(self._before)
        return known

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def utf8(text: str) -> list[int] | None:
    """A token's bytes; None where they are no whole character."""
    return None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())

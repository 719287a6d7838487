"""The template: how a row's columns become the context text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from foreword.errors import ForewordError, nearest
from foreword.records import Row

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_CUTS = ("cut-start", "cut")
_SOFT = re.compile(r"soft:(\d+)")


@dataclass(frozen=True)
class Field:
    """A column in the template. ``cut``: which end gives way when a row is too long."""

    column: str
    cut: str = ""


@dataclass(frozen=True)
class Soft:
    """A place for virtual tokens in the template, ``{soft:N}``."""

    tokens: int


@dataclass(frozen=True)
class Template:
    """A parsed template: literals, fields and places for virtual tokens in order."""

    source: str
    parts: tuple[str | Field | Soft, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields in order of appearance."""
        return tuple(p for p in self.parts if isinstance(p, Field))

    @property
    def soft_tokens(self) -> int:
        """Virtual tokens that the template places; 0 where it leaves that to ``prompt.placement``."""
        return sum(p.tokens for p in self.parts if isinstance(p, Soft))

    @property
    def closing(self) -> str:
        """The literal after the last field, such as ``" Label :"``; may be empty."""
        return self.parts[-1] if isinstance(self.parts[-1], str) else ""

    def pieces(self, row: Row) -> list[str | Soft]:
        """The context of a row: its text, cut where virtual tokens stand."""
        found: list[str | Soft] = [""]
        for part in self.parts:
            if isinstance(part, Soft):
                found += [part, ""]
            else:
                found[-1] = f"{found[-1]}{part if isinstance(part, str) else row[part.column]}"
        return [p for p in found if p != ""] or [""]

    def render(self, row: Row) -> str:
        """The context text of a row, without virtual tokens."""
        return "".join(p for p in self.pieces(row) if isinstance(p, str))

    @property
    def cuts(self) -> tuple[Field, ...]:
        """The fields that give way when a row is too long: the marked ones, else all, at their end."""
        return tuple(f for f in self.fields if f.cut) or tuple(Field(f.column, "cut") for f in self.fields)

    def shorten(self, row: Row, kept: int) -> Row:
        """The row with at most ``kept`` characters in each field that gives way: the longest goes first."""
        return {**row, **{f.column: _shorten(str(row[f.column]), f, kept) for f in self.cuts}}


def parse(source: str) -> Template:
    """Parses ``"Tweet text : {Tweet text|cut} Label :"``; ``{{`` and ``}}`` are plain braces, ``{soft:8}`` a place for
    eight virtual tokens.

    Spaces at the very end are dropped: they belong to the target, which is tokenised with
    its leading separator (a label after ``"Label : "`` is tokenised unlike running text).
    """
    parts: list[str | Field | Soft] = []
    literal, at = "", 0
    for match in _PIECE.finditer(source):
        literal += source[at : match.start()]
        at = match.end()
        token = match.group(0)
        if token in ("{{", "}}"):
            literal += token[0]
        elif match.group(1) is None:
            raise ForewordError(
                f"a single '{token}' at character {match.start() + 1}",
                f"template {source!r}",
                "write columns as {column}, and {{ or }} for a plain brace",
            )
        else:
            if literal:
                parts.append(literal)
            literal = ""
            soft = _SOFT.fullmatch(match.group(1))
            parts.append(Soft(int(soft.group(1))) if soft else _field(match.group(1), source))
    literal = (literal + source[at:]).rstrip(" ")
    if literal:
        parts.append(literal)
    template = Template(source, tuple(parts))
    if not template.fields:
        raise ForewordError("the template names no column", f"template {source!r}", "name one, as in '{text} Label :'")
    return template


def default_template(column: str) -> str:
    """The template when only an input column is given: ``"{COL} Label :"``."""
    return "{" + column + "} Label :"


def with_closing(source: str, closing: str) -> str:
    """The template with another text behind its last column; places for virtual tokens there stay."""
    parts = parse(source).parts
    return "".join(map(_written, parts[:-1] if isinstance(parts[-1], str) else parts)) + escaped(closing)


def _written(part: str | Field | Soft) -> str:
    if isinstance(part, Soft):
        return f"{{soft:{part.tokens}}}"
    if isinstance(part, Field):
        return "{" + "|".join(filter(None, (part.column, part.cut))) + "}"
    return escaped(part)


def escaped(text: str) -> str:
    """A text as a template has it: its braces doubled."""
    return text.replace("{", "{{").replace("}", "}}")


def require_columns(wanted: Sequence[str], there: Sequence[str], where: str) -> None:
    """Raises with the columns there and the nearest one when a wanted column is missing."""
    for column in wanted:
        if column not in there:
            raise ForewordError(
                f"no column '{column}'",
                f"{where} (columns: {', '.join(map(repr, there))})",
                nearest(column, there) or "name one of those columns",
            )


def _field(inner: str, source: str) -> Field:
    cut = next((c for c in _CUTS if inner.endswith(f"|{c}")), "")
    column = inner.removesuffix(f"|{cut}") if cut else inner
    if not column.strip():
        raise ForewordError("an empty {} names no column", f"template {source!r}", "write {column}")
    return Field(column, cut)


def _shorten(text: str, field: Field, kept: int) -> str:
    return text[max(len(text) - kept, 0) :] if field.cut == "cut-start" else text[:kept]

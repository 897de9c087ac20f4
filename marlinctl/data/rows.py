"""One row of data as a text or a chat, and what becomes of rows that are neither.

    {"text": "..."}                                                   a text
    {"messages": [{"role": "user", "content": "..."}, ...]}           a chat, as OpenAI writes it; content may be a list of text parts
    {"conversations": [{"from": "human", "value": "..."}, ...]}       a chat, as ShareGPT writes it
    {"instruction": "...", "input": "...", "output": "..."}           a chat of two turns, from Alpaca; `input` may be absent or empty

The first of these that a row has counts. In files for calibration a part of the rows may be damaged: they are skipped and counted, up to
MOST_BAD of those that were read. In a text that is measured every row must be good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from marlinctl.errors import BadInput, Problem, UsageError

LONGEST_TEXT = 1 << 24  # characters of one text or paragraph; WikiText-2's test text has 1.3 million
CHAT_COLUMNS = ("messages", "conversations")
ALPACA_COLUMNS = ("instruction", "input", "output")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}  # ShareGPT's `from`
MOST_BAD = 0.1  # of the rows that are read
NAMED = 3  # bad rows that a message names
_ENOUGH = 100  # bad rows after which a file that holds hardly anything else is given up

Chat = list[dict[str, Any]]  # [{"role": "user", "content": "..."}, ...], what chat templates take
Document = str | Chat
Item = Sequence[Any]  # (where, document) or (where, None, what, fix), which JSON can carry out of a confined process


@dataclass(slots=True)
class RowCount:
    """What was read of one source. `where` is the row that was read last."""

    source: str
    read: int = 0
    skipped: int = 0
    where: str = ""
    problems: list[Problem] = field(default_factory=list)  # of the first NAMED rows that were skipped
    _refused: int = 0  # by the chat template

    def skip(self, problem: Problem, *, by_template: bool = False) -> None:
        """BadInput E385 (UsageError E253 where it is the model's template that refuses them) when too many rows are bad already."""
        self.skipped += 1
        self._refused += by_template
        if len(self.problems) < NAMED:
            self.problems.append(problem)
        if self.skipped >= _ENOUGH:
            self.require()

    def require(self) -> None:
        """Raises as `skip` does, at the end of the reading."""
        if self.skipped <= MOST_BAD * self.read:
            return
        first, *more = self.problems
        what = f"{first.what} ({self.skipped:,} of {self.read:,} rows cannot be used, and at most {MOST_BAD:.0%} may be skipped)"
        kind: type[BadInput | UsageError] = UsageError if self._refused == self.skipped else BadInput
        raise kind("E253" if kind is UsageError else "E385", what, where=first.where, fix=first.fix, more=more)

    def facts(self) -> dict[str, Any]:
        """For the report. Where the rows are is said without the path of the file."""
        named = [f"{problem.where.removeprefix(self.source).lstrip(', ')}: {problem.what}" for problem in self.problems]
        return {"read": self.read, "skipped": self.skipped, **({"first": named} if named else {})}


def usable(items: Iterator[Item], count: RowCount | None) -> Iterator[Document]:
    """The documents among the items. Without a count the first bad row is a BadInput E385."""
    for where, document, *problem in items:
        if count is not None:
            count.read += 1
            count.where = where
        if document is not None:
            yield document
        elif count is None:
            raise BadInput("E385", problem[0], where=where, fix=problem[1])
        else:
            count.skip(Problem(problem[0], where, problem[1]))


def item_of(row: Mapping[str, Any], *, chats: bool, where: str) -> Item:
    try:
        return where, _document(row, chats=chats, where=where)
    except BadInput as error:
        return bad(error.problems[0].what, where=error.problems[0].where, fix=error.problems[0].fix)


def bad(what: str, *, where: str, fix: str) -> Item:
    return where, None, what, fix


def columns_of(names: Sequence[str], *, chats: bool) -> list[str]:
    """The columns that make a document, of those that there are; [] where none do."""
    for name in ("text", *(CHAT_COLUMNS if chats else ())):
        if name in names:
            return [name]
    if chats and "instruction" in names and "output" in names:
        return [name for name in ALPACA_COLUMNS if name in names]
    return []


def no_column(names: Sequence[str], *, chats: bool, where: str) -> BadInput:
    wanted = ", ".join(("text", *CHAT_COLUMNS, "instruction")) if chats else "text"
    listed = ", ".join(str(name)[:40] for name in names[:12]) or "none"
    return BadInput("E385", f"no field `{wanted}`; there are: {listed}", where=where, fix="rename the field that holds the text to `text`")


def _document(row: Mapping[str, Any], *, chats: bool, where: str) -> Document:
    columns = columns_of(list(row), chats=chats)
    if not columns:
        raise no_column(list(row), chats=chats, where=where)
    column = columns[0]
    if column in CHAT_COLUMNS:
        return _chat(row[column], where=f"{where}, {column}")
    if column != "text":
        return _instructed(row, where=where)
    return encodable(_string(row, "text", where=where), where=where)


def _instructed(row: Mapping[str, Any], *, where: str) -> Chat:
    asked, answer = _string(row, "instruction", where=where), _string(row, "output", where=where)
    given = _string(row, "input", where=where) if row.get("input") else ""
    if not asked.strip() or not answer.strip():
        raise BadInput("E385", "`instruction` or `output` is empty", where=where, fix="fill both")
    question = f"{asked}\n\n{given}" if given.strip() else asked
    return [
        {"role": "user", "content": encodable(question, where=where)},
        {"role": "assistant", "content": encodable(answer, where=where)},
    ]


def _chat(turns: Any, *, where: str) -> Chat:
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind_of(turns)
        raise BadInput("E385", f"a chat must be a list of turns, this is {found}", where=where, fix=_CHAT_FIX)
    chat: Chat = []
    for place, turn in enumerate(turns, start=1):
        if isinstance(turn, dict) and "from" in turn and "value" in turn:
            turn = {"role": ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"]}
        role, content = (turn.get("role"), _content(turn.get("content"))) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or content is None:
            raise BadInput("E385", f"turn {place} of the chat has no role and content", where=where, fix=_CHAT_FIX)
        chat.append({"role": encodable(role, where=where), "content": encodable(content, where=where)})
    return chat


def _content(value: Any) -> str | None:
    """A string, or OpenAI's list of {"type": "text", "text": "..."}; None for pictures, calls of tools and what else there is."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        texts = [part.get("text") for part in value]
        return "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    return value if isinstance(value, str) else None


def _string(row: Mapping[str, Any], name: str, *, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise BadInput("E385", f"`{name}` is {kind_of(value)}, not a string", where=where, fix="write the text as a string")
    return value


def encodable(text: str, *, where: str) -> str:
    """JSON may spell half of a surrogate pair (\\ud83d), which is not a character and which no tokenizer takes."""
    if len(text) > LONGEST_TEXT:
        raise BadInput("E385", f"a text is longer than {LONGEST_TEXT:,} characters", where=where, fix="divide it into several rows")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(
            "E385", f"half a surrogate pair at place {error.start + 1} of the text", where=where, fix="write the text again as proper UTF-8"
        ) from error
    return text


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


_CHAT_FIX = 'write turns as {"role": "user", "content": "..."}'

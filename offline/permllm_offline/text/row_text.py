"""The text of a row: one of its fields, or its messages in the model's chat template."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from permllm_offline.errors import OfflineError, first_line

TEXT_FIELD = "text"
MESSAGES_FIELDS = ("messages", "conversations")
"""Fields of messages that are read where rows have no text, the first that is there."""
ROLES = {"human": "user", "gpt": "assistant"}
"""What chat templates call those that ShareGPT's form of a message calls otherwise."""

_DAY = datetime(2026, 1, 1)
"""Today for templates that write the date: the same rows give the same tokens on every day."""
_NOW = "strftime_now"
"""What templates call for the date. Transformers hands no function to a template from 5.25 on."""
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcdeHIjmMpSuUwWxXyYzZ%"]
"""What strftime fills in, without zeros in front too."""


@dataclass(frozen=True)
class RowText:
    """What is read of the rows of a data set.

    Args:
        field: name of the one that holds the text, or messages.
        tokenizer: of the model, from ``tokenizer.load_tokenizer``; of use for messages alone.
    """

    field: str = TEXT_FIELD
    tokenizer: Any = None

    def field_of(self, names: Container[str]) -> str:
        """Name the field that is read where rows have these: messages where there is no text."""
        if self.field != TEXT_FIELD or TEXT_FIELD in names:
            return self.field
        return next((field for field in MESSAGES_FIELDS if field in names), self.field)

    def of(self, row: object, source: str) -> str:
        """Return the text of one row of ``source``, none where it is null.

        Raises:
            OfflineError: neither text nor messages are in the field, or no template takes these.
        """
        if isinstance(row, dict) and (field := self.field_of(row)) in row:
            value = row[field]
            if value is None or isinstance(value, str):
                return value or ""
            if isinstance(value, list):
                return self._conversation(value, source)
        fields = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise OfflineError(
            f'{source} has a row without a string field "{self.field}" (found: {fields}). Give '
            "--text-field the name of the field that holds the text, or a list of messages."
        )

    def _conversation(self, messages: list[object], source: str) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise OfflineError(
                f"{source} has rows of messages, and the tokenizer of the model has no chat "
                "template to write them with. Take the tokenizer of an instruct model, or give "
                "--text-field a field that holds plain text."
            )
        taken = [_message(message, source) for message in messages]
        if not taken:
            return ""
        try:
            text: str = self.tokenizer.apply_chat_template(
                taken, tokenize=False, chat_template=_dated(self.tokenizer.chat_template)
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise OfflineError(
                f"the chat template of the model refuses a row of {source} "
                f"({first_line(error)}). Leave out rows whose roles it does not take in their "
                "order, or give --text-field a field that holds plain text."
            ) from error
        begins = getattr(self.tokenizer, "window_begin", None) is not None
        # A window gets that token by itself.
        return text.removeprefix(self.tokenizer.bos_token or "") if begins else text


def _dated(template: object) -> str | None:
    """The template with a macro for the date of `_DAY`; None where it asks for no date.

    Several templates are a dictionary, of which transformers takes the default.
    """
    chosen = template.get("default") if isinstance(template, dict) else template
    if not isinstance(chosen, str) or _NOW not in chosen:
        return None
    parts = "".join(f" | replace({part!r}, {_DAY.strftime(part)!r})" for part in _DIRECTIVES)
    return f"{{% macro {_NOW}(format) %}}{{{{ format{parts} }}}}{{% endmacro +%}}{chosen}"


def _message(message: object, source: str) -> dict[str, object]:
    """One message as templates take it: its content one string, nothing that is null."""
    given: Mapping[str, object] = message if isinstance(message, dict) else {}
    if "from" in given and "role" not in given:
        given = _from_sharegpt(given)
    content = given.get("content")
    if isinstance(content, list):
        content = _joined(content)
    elif content is None and given.get("tool_calls"):
        content = ""
    if not isinstance(given.get("role"), str) or not isinstance(content, str):
        found = ", ".join(message) if isinstance(message, dict) else type(message).__name__
        raise OfflineError(
            f'{source} has a message without a "role" and a "content" of text (found: {found}). '
            'Each message must be {"role": ..., "content": ...}, the content a string or a list of '
            'text parts, or {"from": ..., "value": ...}; give --text-field another field where the '
            "rows have one."
        )
    return {name: value for name, value in given.items() if value is not None} | {
        "content": content
    }


def _from_sharegpt(message: Mapping[str, object]) -> dict[str, object]:
    """The same message with the names that templates know; other roles stay as they are."""
    role = message["from"]
    others = {name: value for name, value in message.items() if name not in ("from", "value")}
    known = ROLES.get(role, role) if isinstance(role, str) else role
    return others | {"role": known, "content": message.get("value")}


def _joined(parts: list[object]) -> str | None:
    """The text of parts, or None where one is no text."""
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in parts
    ]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None

"""What a user asks of the plugin beside what the checkpoint says.

vllm serve DIRECTORY --additional-config '{"permllm": {"head": "int8"}}'
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from permllm_vllm.compat import get_current_vllm_config_or_none, init_logger

logger = init_logger("vllm.permllm.options")

KEY = "permllm"


class ServingOptions(BaseModel):
    """Options under the key "permllm" of vLLM's ``--additional-config``.

    Attributes:
        head: "dense" multiplies the output head's weights as they are, "int8" rounds them to int8
            with a scale for each word, where a kernel reads that. None rounds the head of a draft,
            which decides no token, and no other one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    head: Literal["dense", "int8"] | None = None


def serving_options() -> ServingOptions:
    """Read the options of the engine that is being built.

    Raises:
        ValueError: an unknown option, or a value that it does not take.
    """
    config: Any = get_current_vllm_config_or_none()
    given = getattr(config, "additional_config", None) or {}
    entries = given.get(KEY, {}) if isinstance(given, dict) else {}
    for key in _meant(given) if isinstance(given, dict) else ():
        logger.warning_once(
            "--additional-config has %r, which nothing of PermLLM reads: was %r meant?",
            key,
            f'{{"{KEY}": {{"head": "int8"}}}}',
        )
    try:
        return ServingOptions.model_validate(entries)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, (KEY, *e['loc'])))}: {e['msg']}" for e in error.errors()
        )
        raise ValueError(
            f'--additional-config has {{"{KEY}": {entries!r}}}, which cannot be used ({found}). '
            f'Give {{"{KEY}": {{"head": "int8"}}}}, or "dense".'
        ) from error


def _meant(given: Mapping[Any, Any]) -> list[str]:
    """Keys that are near to this plugin's, or options of it in the wrong place."""
    return [
        key
        for key in given
        if isinstance(key, str)
        and key != KEY
        and (key in ServingOptions.model_fields or get_close_matches(key.lower(), [KEY]))
    ]

"""Chat templates: the Jinja programs that turn messages into the text a model was trained on.

A template comes with a checkpoint and is not trusted: it runs in Jinja's sandbox, sees plain values only, and whatever
it raises is reported in one line. Conventions are those of Hugging Face transformers (`apply_chat_template`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from gatework.plugins.errors import GateworkError
from gatework.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Environment, Template

Message = dict[str, Any]


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """The text of a conversation; encode it with `add_special_tokens=False`, since templates write BOS themselves.

    Args:
        messages: [{"role": "user", "content": "..."}, ...]; further keys are passed to the template.
        add_generation_prompt: end with what introduces the assistant's answer.

    Raises:
        GateworkError: the messages are malformed, there is no template, it refuses the messages, or it is broken.
    """
    plain = _plain(messages)
    template = _compile(_default_template(tokenizer.config.chat_templates))
    try:
        return template.render(
            messages=plain,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **_special_tokens(tokenizer),
        )
    except Exception as error:  # a template can raise anything
        raise GateworkError(f"the chat template cannot render these messages: {_reason(error)}") from None


def _default_template(templates: dict[str, str]) -> str:
    if not templates:
        raise GateworkError(
            "this tokenizer has no chat template",
            fix="write the prompt yourself, or add a chat_template.jinja to the checkpoint and build the engine again",
        )
    if "default" not in templates:
        raise GateworkError("no chat template is the default one", got=", ".join(templates), expected="default")
    return templates["default"]


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens by name, with those that only the vocabulary knows."""
    of_vocabulary = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    named = {name: tokenizer.token(token_id) for name, token_id in of_vocabulary.items() if token_id is not None}
    return named | tokenizer.config.special_tokens


def _plain(messages: object) -> list[Message]:
    """The messages, checked, as a copy in plain JSON values. Keys whose value is None are dropped."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise _wrong("messages", messages, 'a list of {"role": ..., "content": ...}, not empty')
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong(f"message {number}", message, 'an object {"role": ..., "content": ...}')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise _wrong(f"{key} of message {number}", message.get(key, "nothing"), "a string")
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        plain: list[Message] = json.loads(json.dumps(kept))
    except (TypeError, ValueError, RecursionError) as error:
        raise GateworkError(f"messages are not plain JSON: {error}") from None
    return plain


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    try:
        return _environment().from_string(source)
    except Exception as error:  # TemplateSyntaxError, and whatever Python's compiler raises
        raise GateworkError(f"the chat template is broken: {_reason(error)}") from None


@cache
def _environment() -> Environment:
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %}, which marks the assistant's text for training; here only its body counts."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PublicNamespace(Namespace):
        """A namespace that cannot be made to look like something else by way of Python's special attributes."""

        def __init__(self, /, *args: Any, **attributes: Any) -> None:
            super().__init__()
            for name, value in dict(*args, **attributes).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name}")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"namespace": PublicNamespace, "dict": _dict}
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    return environment


def _dict(*args: Any, **items: Any) -> dict[Any, Any]:
    """`dict` for templates, without the type's attributes."""
    return dict(*args, **items)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _reason(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return f"{error or type(error).__name__}" + (f" (line {line} of the template)" if line else "")


def _wrong(what: str, got: object, expected: str) -> GateworkError:
    return GateworkError(f"{what} cannot be used", got=repr(got)[:80], expected=expected)

"""The small JSON files beside a tokenizer's vocabulary: special tokens, added tokens and chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatework.plugins.errors import GateworkError


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in a text before the vocabulary is applied.

    Attributes:
        id: None where the files give none: the vocabulary knows it.
        special: left out of decoded text when special tokens are skipped.
        lstrip, rstrip: takes the whitespace before or after it along.
        single_word: found only where no letter or digit touches it.
    """

    content: str
    id: int | None = None
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """tokenizer_config.json with the files that complete it, read as Hugging Face transformers reads them.

    special_tokens_map.json and added_tokens.json count only where tokenizer_config.json has no `added_tokens_decoder`;
    a chat template in its own file goes before one in tokenizer_config.json.

    Attributes:
        tokenizer_class: as named by the checkpoint, or None.
        special_tokens: "bos_token" -> "<s>", ...: the names that chat templates use.
        added_tokens: with those of special_tokens and additional_special_tokens, once each.
        chat_templates: name -> source; the usual one is "default".
        add_bos_token, add_eos_token, legacy: as given, or None.
    """

    tokenizer_class: str | None
    special_tokens: dict[str, str]
    added_tokens: tuple[AddedToken, ...]
    chat_templates: dict[str, str]
    add_bos_token: bool | None
    add_eos_token: bool | None
    legacy: bool | None

    @classmethod
    def load(cls, directory: Path) -> TokenizerConfig:
        """Read what the directory has of these files.

        Raises:
            GateworkError: a file is damaged; names it.
        """
        file = directory / "tokenizer_config.json"
        config = _read(file)
        flags = {name: config.get(name) for name in ("add_bos_token", "add_eos_token", "legacy")}
        tokenizer_class = config.get("tokenizer_class")
        named = dict(config)
        added: list[AddedToken] = []
        if "added_tokens_decoder" in config:
            added = _declared_tokens(file, config["added_tokens_decoder"])
        else:
            named |= _read(directory / "special_tokens_map.json")
            special = {token.content for token in _named_tokens(named)}
            ids = _read(directory / "added_tokens.json")
            if not all(type(token_id) is int and token_id >= 0 for token_id in ids.values()):
                raise _damaged(directory / "added_tokens.json", "its values are not token ids")
            added = [AddedToken(content, token_id, content in special) for content, token_id in ids.items()]
        known = {token.content for token in added}
        added += [token for token in _named_tokens(named) if token.content not in known]
        return cls(
            tokenizer_class=tokenizer_class if isinstance(tokenizer_class, str) else None,
            special_tokens={name: token.content for name, value in named.items() if (token := _named(name, value))},
            added_tokens=tuple({token.content: token for token in added if token.content}.values()),
            chat_templates=_chat_templates(directory, config.get("chat_template")),
            **{name: value if isinstance(value, bool) else None for name, value in flags.items()},
        )


def _declared_tokens(file: Path, declared: Any) -> list[AddedToken]:
    """The tokens of `added_tokens_decoder`: token id -> content and flags."""
    try:
        tokens = [(int(token_id), _token(value)) for token_id, value in declared.items()]
    except (AttributeError, ValueError):
        raise _damaged(file, "its added_tokens_decoder is not a table of tokens") from None
    found = []
    for token_id, token in tokens:
        if token is None or token_id < 0:
            raise _damaged(file, f"its added token {token_id} has no content")
        flags = declared[str(token_id)]
        special = isinstance(flags, dict) and flags.get("special") is True
        found.append(AddedToken(token.content, token_id, special, token.lstrip, token.rstrip, token.single_word))
    return found


def _named_tokens(named: dict[str, Any]) -> list[AddedToken]:
    """The tokens of bos_token, eos_token, ... and of the lists of further special tokens."""
    values: list[Any] = [value for name, value in named.items() if _named(name, value)]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        further = named.get(name) or ()
        values += further.values() if isinstance(further, dict) else further if isinstance(further, list) else ()
    return [token for token in map(_token, values) if token]


def _named(name: str, value: Any) -> AddedToken | None:
    return _token(value) if name.endswith("_token") else None


def _token(value: Any) -> AddedToken | None:
    """A token from its JSON: a string, or an object with `content` and flags."""
    if isinstance(value, str):
        return AddedToken(value)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    flags = (value.get(name) is True for name in ("lstrip", "rstrip", "single_word"))
    return AddedToken(value["content"], None, True, *flags)


def _chat_templates(directory: Path, configured: Any) -> dict[str, str]:
    own_file = directory / "chat_template.jinja"
    if own_file.is_file():
        return {"default": _text(own_file)}
    templates = _read(directory / "chat_template.json").get("chat_template", configured)
    if isinstance(templates, str):
        return {"default": templates}
    items: Iterable[Any] = templates if isinstance(templates, list) else ()
    pairs = [(item.get("name"), item.get("template")) for item in items if isinstance(item, dict)]
    return {name: template for name, template in pairs if isinstance(name, str) and isinstance(template, str)}


def _read(file: Path) -> dict[str, Any]:
    """The file's JSON object; empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(_text(file))
    except (ValueError, RecursionError):
        raise _damaged(file, "it is not JSON") from None
    if not isinstance(content, dict):
        raise _damaged(file, "it is not a JSON object")
    return content


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _damaged(file, "it is not UTF-8") from None


def _damaged(file: Path, why: str) -> GateworkError:
    return GateworkError(f"{file} is damaged: {why}", fix="copy the checkpoint's tokenizer files again")

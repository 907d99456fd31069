"""Tokenizers in a `tokenizer.json`, through Hugging Face's tokenizers library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatework.plugins.errors import GateworkError
from gatework.runtime.tokenizer import EACH_BYTE, Tokenizer
from gatework.runtime.tokenizer_config import TokenizerConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class JsonTokenizer(Tokenizer):
    """tokenizer.json as it stands: its post-processor alone decides about BOS and EOS, as in transformers 5.

    Decoding follows the file's `decoder`, which must be one whose tokens do not depend on the ones after them:
    ByteLevel, Metaspace, none, or a sequence of Replace, ByteFallback, Fuse and Strip. Bytes of a ByteFallback that are
    not UTF-8 become one U+FFFD each, as in SentencePiece (the tokenizers library also gives up the valid characters
    beside them, so that text already streamed would change).

    Raises:
        GateworkError: the file is damaged, or has another decoder.
    """

    def __init__(self, file: Path, config: TokenizerConfig) -> None:
        self.config = config
        self._backend = _load(file)
        _mark_special(self._backend, config)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token_id = self._named("bos_token")
        self.eos_token_id = self._named("eos_token")
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._decoder = _Decoder(file, self._backend)
        self.utf8_errors = EACH_BYTE if self._decoder.byte_fallback else "replace"
        self._spelled: dict[tuple[int, bool], bytes] = {}

    def spell(self, token_id: int, first: bool) -> bytes | None:
        key = token_id, first
        if key not in self._spelled:
            token = self._backend.id_to_token(token_id) if token_id >= 0 else None
            if token is None:
                return None
            self._spelled[key] = self._decoder.spell(token, first)
        return self._spelled[key]

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _named(self, name: str) -> int | None:
        return self._backend.token_to_id(self.config.special_tokens.get(name, ""))


class _Decoder:
    """What a tokenizer.json's decoder makes of one token."""

    def __init__(self, file: Path, backend: Backend) -> None:
        self._replacements: list[tuple[str, str]] = []
        self.byte_fallback = False
        self._strip = b""  # from the start of the first token
        self._alphabet: dict[str, int] | None = None
        self._before_rest = b""  # between two tokens
        self._dropped_first = ""  # from the first token
        fused = False
        decoder: Any = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
        for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
            match step:
                case {"type": "ByteLevel"} if step is decoder:
                    self._alphabet = byte_alphabet()
                case {"type": None}:
                    self._before_rest = b" "
                case {"type": "Metaspace", "replacement": mark} if step is decoder:
                    self._replacements.append((mark, " "))
                    self._dropped_first = "" if step.get("prepend_scheme") == "never" else mark
                case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused:
                    self._replacements.append((old, new))
                case {"type": "ByteFallback"} if not fused:
                    self.byte_fallback = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0} if fused:
                    self._strip = b" " * start
                case _:
                    raise _unsupported(file, decoder)

    def spell(self, token: str, first: bool) -> bytes:
        if self._alphabet is not None:
            return _byte_level(token, self._alphabet)
        if first and self._dropped_first:
            token = token.replace(self._dropped_first, "")
        for old, new in self._replacements:
            token = token.replace(old, new)
        is_byte = _BYTE.fullmatch(token) if self.byte_fallback else None
        spelled = bytes([int(is_byte[1], 16)]) if is_byte else token.encode()
        return spelled.removeprefix(self._strip) if first else self._before_rest + spelled


def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with (Radford et al. 2019, GPT-2, `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    """A byte-level token's bytes; a token with any other character is an added one, and stands for itself."""
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()


def _load(file: Path) -> Backend:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise GateworkError(f"{file} is damaged: {error}", fix="copy it from the checkpoint again") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _mark_special(backend: Backend, config: TokenizerConfig) -> None:
    """Make the config's special tokens special in the backend. One that has no id there is unknown to the model too."""
    from tokenizers import AddedToken

    added = backend.get_added_tokens_decoder()
    for token in config.added_tokens:
        token_id = backend.token_to_id(token.content)
        if token_id is None or not token.special or (token_id in added and added[token_id].special):
            continue
        flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
        backend.add_special_tokens([AddedToken(token.content, **flags, normalized=False, special=True)])


def _unsupported(file: Path, decoder: dict[str, Any]) -> GateworkError:
    steps = [step.get("type") for step in decoder.get("decoders", [decoder])]
    return GateworkError(
        f"{file} has a decoder that cannot be streamed",
        got=" + ".join(map(str, steps)),
        expected="ByteLevel, Metaspace, or Replace + ByteFallback + Fuse + Strip",
    )

"""SentencePiece models: `tokenizer.model` files, as Llama and Mistral ship them, and T5's `spiece.model`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from gatework.plugins.errors import GateworkError
from gatework.runtime.tokenizer import EACH_BYTE, Tokenizer
from gatework.runtime.tokenizer_config import AddedToken, TokenizerConfig

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_SPACE = "\u2581"
_T5 = ("T5Tokenizer", "T5TokenizerFast")
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # ModelProto field 3, normalizer_spec: field 3, add_dummy_prefix, is false


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, with BOS before a text where the model has one (unless `add_bos_token` says no).

    SentencePiece itself reads "<s>" in a text as three characters. Here the model's control pieces and the tokens of
    the JSON files beside it are taken as such, and the text between them goes to SentencePiece. Whether text after such
    a token gets the model's leading space too is `legacy` in tokenizer_config.json, as in transformers: it does when
    that is true, or absent, as in files older than the key.

    T5's classes end a text with EOS unless `add_eos_token` says no. Their sentinels "<extra_id_0>", ... come, where no file
    gives their ids, after the model's pieces, the last one first.

    Raises:
        GateworkError: the file is not a SentencePiece model, or the sentencepiece package is missing.
    """

    utf8_errors = EACH_BYTE

    def __init__(self, file: Path, config: TokenizerConfig) -> None:
        self.config = config
        model = file.read_bytes()
        self._model = _load(file, model)
        # Fields of concatenated protocol buffers override those before.
        self._later_model = _load(file, model + _NO_DUMMY_PREFIX) if config.legacy is False else self._model
        self._prefixes = bool(self._model.normalize("x").startswith(_SPACE))
        self._added = _added_tokens(self._model, config)
        self._adds_eos = config.add_eos_token or (config.add_eos_token is None and config.tokenizer_class in _T5)
        self._by_id = dict(self._added)
        self._pattern = re.compile("|".join(_pattern(token) for _, token in self._added))
        self.vocab_size = max(self._model.get_piece_size(), *(token_id + 1 for token_id in self._by_id))
        self.bos_token_id = self._named("bos_token", self._model.bos_id())
        self.eos_token_id = self._named("eos_token", self._model.eos_id())

    def spell(self, token_id: int, first: bool) -> bytes | None:
        if token_id in self._by_id:
            return self._by_id[token_id].content.encode()
        if not 0 <= token_id < self._model.get_piece_size():
            return None
        piece: str = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if first and self._prefixes:
            piece = piece.removeprefix(_SPACE)
        return piece.replace(_SPACE, " ").encode()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._by_id and self._by_id[token_id].special

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        if add_special_tokens and self.config.add_bos_token is not False and self.bos_token_id is not None:
            ids.append(self.bos_token_id)
        place = 0
        for match in self._pattern.finditer(text):
            ids += self._encode_between(text[place : match.start()], place)
            ids.append(self._added[(match.lastindex or 0) - 1][0])
            place = match.end()
        ids += self._encode_between(text[place:], place)
        if add_special_tokens and self._adds_eos and self.eos_token_id is not None:
            ids.append(self.eos_token_id)
        return ids

    def _encode_between(self, text: str, place: int) -> list[int]:
        model = self._later_model if place else self._model
        return model.encode(text) if text else []

    def _named(self, name: str, of_model: int) -> int | None:
        content = self.config.special_tokens.get(name)
        known = [token_id for token_id, token in self._added if token.content == content]
        return known[0] if known else of_model if of_model >= 0 else None


def _added_tokens(model: SentencePieceProcessor, config: TokenizerConfig) -> list[tuple[int, AddedToken]]:
    """All that is found in a text before SentencePiece sees it, with its id, the longest first."""
    pieces = range(model.get_piece_size())
    control = [token_id for token_id in pieces if model.is_control(token_id) or model.is_unknown(token_id)]
    found = {model.id_to_piece(token_id): (token_id, AddedToken(model.id_to_piece(token_id))) for token_id in control}
    sentinels = [token.content for token in config.added_tokens if _SENTINEL.fullmatch(token.content)]
    for token in config.added_tokens:
        token_id = model.piece_to_id(token.content) if token.id is None else token.id
        number = _SENTINEL.fullmatch(token.content) if token.id is None and config.tokenizer_class in _T5 else None
        if number is not None and int(number[1]) < len(sentinels):
            found[token.content] = model.get_piece_size() + len(sentinels) - 1 - int(number[1]), token
        elif token.id is not None or model.id_to_piece(token_id) == token.content:  # else one that no model knows
            found[token.content] = token_id, token
    return sorted(found.values(), key=lambda pair: -len(pair[1].content))


def _pattern(token: AddedToken) -> str:
    """A regular expression for a token in a text, with one group."""
    content = re.escape(token.content)
    if token.single_word:
        content = rf"(?<!\w){content}(?!\w)"
    return (r"\s*" if token.lstrip else "") + f"({content})" + (r"\s*" if token.rstrip else "")


def _load(file: Path, model: bytes) -> SentencePieceProcessor:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        fix = "pip install 'gatework[sentencepiece]'"
        raise GateworkError(f"{file} needs the sentencepiece package", fix=fix) from None
    try:
        processor = SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        processor = None
    if processor is None or processor.get_piece_size() == 0:
        raise GateworkError(f"{file} is not a SentencePiece model", fix="copy it from the checkpoint again")
    return processor

"""Text to token ids and back, whatever files the tokenizer came in."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from gatework.plugins.errors import GateworkError
from gatework.runtime.tokenizer_config import TokenizerConfig

# SentencePiece writes U+FFFD for each byte that is not UTF-8; Python's "replace" writes one for a cut-off character.
EACH_BYTE = "gatework.each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


class Tokenizer(ABC):
    """A vocabulary and its rules.

    Every token spells some bytes, which need not be whole characters; text is all the bytes together, read as UTF-8
    with U+FFFD for what is not. That holds for whole outputs and for streams alike, so both give the same text.

    Attributes:
        config: special tokens and chat templates.
        vocab_size: the highest token id, plus one. A model's logits may be longer.
        bos_token_id, eos_token_id: of the tokenizer's files, or None; a model's own list of ends may differ.
        utf8_errors: how bytes that are not UTF-8 are shown, as in `bytes.decode`.
    """

    config: TokenizerConfig
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    utf8_errors: str = "replace"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it are taken as such.

        Args:
            add_special_tokens: put BOS (or whatever the tokenizer's files ask for) around the text. Off for a rendered
                chat, whose template writes them.

        Raises:
            GateworkError: the text is not a string, or not one that has a UTF-8 form.
        """
        if not isinstance(text, str):
            raise GateworkError("only text can be encoded", got=type(text).__name__, expected="str")
        if not _has_utf8(text):
            raise GateworkError("the text has no UTF-8 form", got="a lone surrogate", expected="Unicode characters")
        return self._encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids outside the vocabulary have none."""
        stream = self.stream(skip_special_tokens)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def token(self, token_id: int) -> str:
        """One token as it reads inside a text, spaces included; bytes that are not UTF-8 by themselves as \\xNN."""
        return (self.spell(token_id, first=False) or b"").decode("utf-8", errors="backslashreplace")

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for tokens that come one by one."""
        return StreamDecoder(self, skip_special_tokens)

    @abstractmethod
    def spell(self, token_id: int, first: bool) -> bytes | None:
        """The bytes of a token, or None outside the vocabulary.

        Args:
            first: it is the first of its text, and loses the space that `encode` puts before a text.
        """

    @abstractmethod
    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of text when special tokens are skipped."""

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool) -> list[int]: ...


class StreamDecoder:
    """Decodes tokens one by one, each in constant time; all pushes and the flush together are `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.utf8_errors)
        self._first = True

    def push(self, token_id: int) -> str:
        """Take a token; returns the characters that it completes."""
        token_id = int(token_id)
        if self._skip and self._tokenizer.is_special(token_id):
            return ""
        spelled = self._tokenizer.spell(token_id, self._first)
        if spelled is None:
            return ""
        self._first = False
        return self._utf8.decode(spelled)

    def flush(self) -> str:
        """The text has ended: returns what an unfinished character leaves."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint or engine directory; None where it holds none.

    tokenizer.json goes before tokenizer.model and spiece.model (SentencePiece), and those before cl100k_base.tiktoken (DBRX)
    and qwen.tiktoken.

    Raises:
        GateworkError: a file is damaged, of a kind that is not supported, or needs a package that is not installed.
    """
    directory = Path(directory)
    config = TokenizerConfig.load(directory)
    if (directory / "tokenizer.json").is_file():
        from gatework.runtime.tokenizer_json import JsonTokenizer

        return JsonTokenizer(directory / "tokenizer.json", config)
    for name in ("tokenizer.model", "spiece.model"):
        if (directory / name).is_file():
            from gatework.runtime.tokenizer_spm import SentencePieceTokenizer

            return SentencePieceTokenizer(directory / name, config)
    ranks = directory / "cl100k_base.tiktoken"
    if ranks.is_file() or config.tokenizer_class == "TiktokenTokenizerWrapper":
        from gatework.runtime.tokenizer_tiktoken import TiktokenTokenizer

        return TiktokenTokenizer(ranks, config)
    ranks = directory / "qwen.tiktoken"
    if ranks.is_file() or config.tokenizer_class == "QWenTokenizer":
        from gatework.runtime.tokenizer_tiktoken import QWEN, TiktokenTokenizer

        return TiktokenTokenizer(ranks, config, QWEN)
    return None


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

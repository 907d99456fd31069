"""Tokenizers of tiktoken: DBRX's, which is GPT-4's cl100k_base with ChatML's special tokens, and that of the first Qwen."""

from __future__ import annotations

import base64
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gatework.plugins.errors import GateworkError
from gatework.runtime.tokenizer import Tokenizer
from gatework.runtime.tokenizer_config import TokenizerConfig

if TYPE_CHECKING:
    from tiktoken import Encoding

RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"

# How a text is cut before byte pairs are merged; this and the first five tokens are tiktoken's `cl100k_base`.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
SPECIAL_TOKENS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
    "<|pad|>": 100277,
    "<|im_start|>": 100278,
    "<|im_end|>": 100279,
}


QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


@dataclass(frozen=True, slots=True)
class Kind:
    """What an encoding is besides its ranks.

    pattern: how a text is cut. special_tokens: with their ids. fix: how to get the file of ranks. compose: texts are brought to
    Unicode's composed form first.
    """

    name: str
    pattern: str
    special_tokens: dict[str, int]
    fix: str
    compose: bool = False


CL100K = Kind("cl100k_base", PATTERN, SPECIAL_TOKENS, f"download {RANKS_URL}")
QWEN = Kind(
    "Qwen",
    QWEN_PATTERN,
    {name: number for number, name in enumerate(QWEN_NAMES, start=151643)},
    "copy the checkpoint's qwen.tiktoken",
    compose=True,
)


class TiktokenTokenizer(Tokenizer):
    """An encoding with its ranks read from a file in the directory; nothing is ever downloaded.

    No BOS goes before a text unless tokenizer_config.json sets `add_bos_token`. Ids that no token has spell nothing.

    Raises:
        GateworkError: the rank file is missing or damaged, or the tiktoken package is missing.
    """

    def __init__(self, file: Path, config: TokenizerConfig, kind: Kind = CL100K) -> None:
        self.config, self._kind = config, kind
        ranks = _read_ranks(file, kind)
        configured = {token.content: token.id for token in config.added_tokens if token.id is not None}
        self._tokens = kind.special_tokens | configured
        if max(ranks.values()) >= min(self._tokens.values()):
            raise GateworkError(
                f"{file} does not fit its special tokens",
                got=f"a rank of {max(ranks.values())}",
                expected=f"ranks below {min(self._tokens.values())}",
            )
        not_special = {token.content for token in config.added_tokens if not token.special}
        self._special = {token_id for content, token_id in self._tokens.items() if content not in not_special}
        self._encoding = _encoding(file, ranks, self._tokens, kind)
        self._spelled = {rank: token for token, rank in ranks.items()}
        self._spelled |= {token_id: content.encode() for content, token_id in self._tokens.items()}
        self.vocab_size = max(self._spelled) + 1
        self.bos_token_id = self._tokens.get(config.special_tokens.get("bos_token", "<|endoftext|>"))
        self.eos_token_id = self._tokens.get(config.special_tokens.get("eos_token", "<|endoftext|>"))

    def spell(self, token_id: int, first: bool) -> bytes | None:
        return self._spelled.get(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._kind.compose:
            text = unicodedata.normalize("NFC", text)
        ids: list[int] = self._encoding.encode(text, allowed_special="all")
        if add_special_tokens and self.config.add_bos_token and self.bos_token_id is not None:
            ids.insert(0, self.bos_token_id)
        if add_special_tokens and self.config.add_eos_token and self.eos_token_id is not None:
            ids.append(self.eos_token_id)
        return ids


def _read_ranks(file: Path, kind: Kind) -> dict[bytes, int]:
    """Token bytes -> rank, from lines of a base64 token and its rank."""
    if not file.is_file():
        raise GateworkError(
            f"this tokenizer needs {file}",
            got="no such file",
            fix=f"{kind.fix} to there, then build the engine",
        )
    ranks: dict[bytes, int] = {}
    try:
        for line in file.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise _damaged(file, kind, "not lines of a base64 token and its rank") from None
    if len(set(ranks.values())) != len(ranks) or min(ranks.values(), default=0) < 0:
        raise _damaged(file, kind, "two tokens have the same rank")
    if not all(bytes([byte]) in ranks for byte in range(256)):  # tiktoken aborts when it meets such a byte
        raise _damaged(file, kind, "some bytes have no token")
    return ranks


def _encoding(file: Path, ranks: dict[bytes, int], special_tokens: dict[str, int], kind: Kind) -> Encoding:
    try:
        from tiktoken import Encoding
    except ImportError:
        fix = "pip install 'gatework[sentencepiece]'"
        raise GateworkError(f"{file} needs the tiktoken package", fix=fix) from None
    return Encoding(kind.name, pat_str=kind.pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def _damaged(file: Path, kind: Kind, why: str) -> GateworkError:
    return GateworkError(f"{file} is damaged: {why}", fix=f"{kind.fix} again")

"""Makers of tiny tokenizers in every supported file format, trained on a module of the standard library."""

from __future__ import annotations

import base64
import json
import textwrap
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [line for line in Path(textwrap.__file__).read_text().splitlines() if line] + [
    "naïve café über 中文 日本語 😀"
] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]
CHATML = ["<|im_start|>", "<|im_end|>"]
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write tokenizer_config.json."""
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def make_byte_level(directory: Path, *, bos: bool = True, **config: Any) -> Path:
    """tokenizer.json in the style of GPT-2 and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL + CHATML, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = _bos_processor()
    return _save(tokenizer, directory, config)


def make_metaspace(directory: Path, **config: Any) -> Path:
    """tokenizer.json in the style of Llama 2 and Mistral: a leading space, and bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = _bos_processor()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, limit_alphabet=80, show_progress=False)
    words = [word for line in CORPUS for word in line.split()]  # short pieces, as with a pre-tokenizer
    tokenizer.train_from_iterator(words, trainer)
    state = json.loads(tokenizer.to_str())
    pieces = [piece for piece in state["model"]["vocab"] if piece not in SPECIAL]
    order = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    state["model"]["vocab"] = {piece: place for place, piece in enumerate(order)}
    return _save(Tokenizer.from_str(json.dumps(state)), directory, config)


def make_sentencepiece(directory: Path, **config: Any) -> Path:
    """tokenizer.model with the settings of Llama's: BPE, byte fallback, no normalisation, a leading space."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99,
        user_defined_symbols=["<fill>"],
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    if config:
        write_config(directory, CONFIG | config)
    return directory


def make_t5(directory: Path) -> Path:
    """spiece.model with the settings of T5's, and its sentinels in tokenizer_config.json."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(directory / "spiece"),
        vocab_size=300,
        character_coverage=0.99,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "spiece.vocab").unlink()
    named = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    sentinels = [f"<extra_id_{n}>" for n in range(10)]
    write_config(directory, named | {"extra_ids": 10, "additional_special_tokens": sentinels})
    return directory


def make_cl100k(directory: Path, **config: Any) -> Path:
    """cl100k_base.tiktoken with a few hundred ranks."""
    from gatework.runtime.tokenizer_json import byte_alphabet
    from gatework.runtime.tokenizer_tiktoken import PATTERN

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = byte_alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=list(alphabet), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [
        base64.b64encode(bytes(alphabet[char] for char in token)) + f" {rank}\n".encode() for token, rank in vocabulary
    ]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cl100k_base.tiktoken").write_bytes(b"".join(lines))
    write_config(directory, {"tokenizer_class": "TiktokenTokenizerWrapper", "bos_token": "<|endoftext|>"} | config)
    return directory


def _bos_processor() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])


def _save(tokenizer: Tokenizer, directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_config(directory, {"tokenizer_class": "PreTrainedTokenizerFast"} | CONFIG | config)
    return directory

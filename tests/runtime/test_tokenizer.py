"""Tokenizers of every file format against transformers, SentencePiece and tiktoken themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from gatework.plugins.errors import GateworkError
from gatework.runtime import tokenizer_tiktoken
from gatework.runtime.tokenizer import Tokenizer, load_tokenizer
from tests import tiny_tokenizers as tiny

MAKERS: dict[str, Callable[..., Path]] = {
    "byte_level": tiny.make_byte_level,
    "metaspace": tiny.make_metaspace,
    "sentencepiece": tiny.make_sentencepiece,
    "cl100k": tiny.make_cl100k,
}
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
TEXTS = [
    "",
    "hello world",
    "def wrap(self, text):\n    return  text.split()\n",
    "naïve café 中文 日本語 😀👩‍👩‍👧 ∑∂",
    "x   y\t\tz\r\n",
    "<s>hello</s> again <s>",
    "a<s>b </s>c",
    "trailing space ",
    "<fill> and <fill>x",
    "0123456789 it's 'quoted'",
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make(root / kind) for kind, make in MAKERS.items()}


@pytest.fixture(scope="session", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tokenizer:
    return load(folders[request.param])


def load(directory: Path) -> Tokenizer:
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


def same_as_transformers(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_tokenizer_json_agrees_with_transformers(kind: str, folders: dict[str, Path]) -> None:
    same_as_transformers(load(folders[kind]), AutoTokenizer.from_pretrained(folders[kind]), TEXTS)


def test_the_bundled_tokenizer_agrees_with_transformers() -> None:
    same_as_transformers(load(EXAMPLE), AutoTokenizer.from_pretrained(EXAMPLE), TEXTS)


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_a_post_processor_alone_decides_about_bos(tmp_path: Path, bos: bool, add_bos_token: bool) -> None:
    tiny.make_byte_level(tmp_path, bos=bos, add_bos_token=add_bos_token)
    ours, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("hello") == theirs.encode("hello")
    assert (ours.encode("hello")[0] == ours.bos_token_id) is bos


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("add_eos_token", [True, False])
def test_sentencepiece_agrees_with_transformers(
    tmp_path: Path, legacy: bool, add_bos_token: bool, add_eos_token: bool
) -> None:
    tiny.make_sentencepiece(tmp_path, legacy=legacy, add_bos_token=add_bos_token, add_eos_token=add_eos_token)
    # transformers rebuilds the model without SentencePiece: "<fill>" is cut out as special tokens are, and no space is
    # put before a text that begins with one. The next test has the original for both.
    texts = [text for text in TEXTS if "<fill>" not in text and "</s> " not in text]
    same_as_transformers(load(tmp_path), LlamaTokenizer.from_pretrained(tmp_path), texts)


def test_sentencepiece_agrees_with_the_original(folders: dict[str, Path]) -> None:
    import sentencepiece

    ours = load(folders["sentencepiece"])
    original = sentencepiece.SentencePieceProcessor(model_file=str(folders["sentencepiece"] / "tokenizer.model"))
    ordinary = [number for number in range(original.get_piece_size()) if number > 2]

    @given(st.text(st.characters(codec="utf-8")), st.lists(st.sampled_from(ordinary)))
    def check(text: str, ids: list[int]) -> None:
        if not any(special in text for special in ("<s>", "</s>", "<unk>")):
            assert ours.encode(text) == [1, *original.encode(text)]
        assert ours.decode(ids) == original.decode(ids)

    check()
    assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (1, 2, original.get_piece_size())


def test_sentencepiece_with_tokens_of_the_files_beside_it(folders: dict[str, Path], tmp_path: Path) -> None:
    model = folders["sentencepiece"] / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 500, "<|im_start|>": 501, "<plain>": 502}))
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    unknown = {"unk_token": {"content": "<unk>", "lstrip": True, "rstrip": True, "single_word": True}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special | unknown))
    ours = load(tmp_path)
    hello = ours.encode("hello", add_special_tokens=False)
    assert ours.encode("<|im_start|>hello<plain>hello<|im_end|>") == [1, 501, *hello, 502, *hello, 500]
    assert ours.encode("hello \n<unk> hello") == [1, *hello, 0, *hello]
    assert 0 not in ours.encode("hello<unk>")
    assert ours.decode([501, 502, *hello, 500]) == "<plain> hello"
    assert ours.decode([501, *hello, 500], skip_special_tokens=False) == "<|im_start|> hello<|im_end|>"
    assert (ours.eos_token_id, ours.vocab_size) == (500, 503)
    assert ours.token(501) == "<|im_start|>"


@pytest.mark.parametrize(
    "text", ["The wrapped text", "<extra_id_0> lines in <extra_id_1> one.", "a  b</s> c", "", "é<extra_id_9>"]
)
def test_t5_agrees_with_transformers(text: str, tmp_path: Path) -> None:
    """EOS behind every text, and sentinels whose ids no file tells."""
    path = tiny.make_t5(tmp_path)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert ours is not None
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.vocab_size, ours.eos_token_id) == (310, 1)


def test_cl100k_agrees_with_tiktoken(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken
    from tiktoken_ext import openai_public

    file = folders["cl100k"] / "cl100k_base.tiktoken"
    ranks = tokenizer_tiktoken._read_ranks(file, tokenizer_tiktoken.CL100K)
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
    definition = openai_public.cl100k_base()
    assert definition["pat_str"] == tokenizer_tiktoken.PATTERN
    assert definition["special_tokens"].items() <= tokenizer_tiktoken.SPECIAL_TOKENS.items()
    original, ours = tiktoken.Encoding(**definition), load(folders["cl100k"])

    @given(st.text(st.characters(codec="utf-8")), st.lists(st.integers(0, len(ranks) - 1)))
    def check(text: str, ids: list[int]) -> None:
        if "<|" not in text:
            assert ours.encode(text) == original.encode(text)
        assert ours.decode(ids) == original.decode(ids)

    check()
    converted = TikTokenConverter(str(file), pattern=tokenizer_tiktoken.PATTERN, extra_special_tokens=[]).converted()
    for text in TEXTS:
        assert ours.encode(text) == converted.encode(text).ids


def test_dbrx_special_tokens(folders: dict[str, Path]) -> None:
    ours = load(folders["cl100k"])
    text = "<|im_start|>user\nhi<|im_end|><|endoftext|><|pad|>"
    hi = ours.encode("user\nhi")
    assert ours.encode(text) == [100278, *hi, 100279, 100257, 100277]
    assert ours.decode(ours.encode(text)) == "user\nhi"
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (100257, 100257, 100280)
    assert ours.decode([100256, 100300]) == ""


def test_qwen(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its own cut, texts in composed form, and special tokens at fixed ids, on the ranks of the other one."""
    (tmp_path / "qwen.tiktoken").write_bytes((folders["cl100k"] / "cl100k_base.tiktoken").read_bytes())
    tiny.write_config(tmp_path, {"tokenizer_class": "QWenTokenizer"})
    ours, other = load(tmp_path), load(folders["cl100k"])
    assert (ours.eos_token_id, ours.vocab_size) == (151643, 151851)
    assert ours.encode("<|im_start|>hi<|im_end|><|endoftext|>") == [151644, *other.encode("hi"), 151645, 151643]
    assert ours.encode("cafe\u0301") == ours.encode("caf\u00e9") != other.encode("cafe\u0301")
    assert ours.encode("123") == [token for digit in "123" for token in other.encode(digit)]
    assert ours.decode(ours.encode("x   y\t\tz\r\n")) == "x   y\t\tz\r\n"


def test_streams_agree_with_whole_texts(tokenizer: Tokenizer) -> None:
    some = st.integers(0, min(tokenizer.vocab_size, 520) + 3)

    @given(st.lists(some), st.booleans())
    def any_tokens(ids: list[int], skip: bool) -> None:
        stream = tokenizer.stream(skip)
        assert "".join([stream.push(token_id) for token_id in ids]) + stream.flush() == tokenizer.decode(ids, skip)

    @given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd<")))
    def any_text(text: str) -> None:
        stream = tokenizer.stream()
        pieces = [stream.push(token_id) for token_id in tokenizer.encode(text)]
        assert stream.flush() == ""
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)

    any_tokens()
    any_text()


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_decoding_agrees_with_the_tokenizers_library(kind: str, folders: dict[str, Path]) -> None:
    ours, backend = load(folders[kind]), Backend.from_file(str(folders[kind] / "tokenizer.json"))
    # Where byte fallback meets bytes that are not UTF-8, the library drops the whole run of bytes: no bytes there.
    usable = [number for number in range(ours.vocab_size) if kind == "byte_level" or not 3 <= number < 259]

    @given(st.lists(st.sampled_from(usable)), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        assert ours.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("decoder", [None, decoders.Metaspace(), decoders.Metaspace(prepend_scheme="never")])
def test_decoders_without_bytes_agree_with_the_tokenizers_library(tmp_path: Path, decoder: Any) -> None:
    words = ["▁", "▁▁", "a", "▁b", "c▁d", "é", "<s>"]
    backend = Backend(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    backend.decoder = decoder
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = load(tmp_path)

    @given(st.lists(st.integers(0, len(words))))
    def check(ids: list[int]) -> None:
        assert ours.decode(ids) == backend.decode(ids)

    check()


def test_a_token_on_its_own(folders: dict[str, Path]) -> None:
    ours = load(folders["sentencepiece"])
    assert ours.token(ours.encode("a", add_special_tokens=False)[0]) == " a"
    assert ours.token(4 + 0xE4) == "\\xe4"
    assert ours.token(10**6) == ""


def test_special_tokens_of_the_config_become_special(tmp_path: Path) -> None:
    tiny.make_byte_level(tmp_path)
    file = tmp_path / "tokenizer.json"
    state = json.loads(file.read_text())
    state["added_tokens"] = [token | {"special": False} for token in state["added_tokens"] if token["id"] != 2]
    file.write_text(json.dumps(state))
    tiny.write_config(tmp_path, tiny.CONFIG | {"pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"})
    ours, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for skip in (True, False):
        assert ours.decode([1, 80, 3, 2], skip) == theirs.decode([1, 80, 3, 2], skip_special_tokens=skip)
    assert ours.encode("a</s>") == theirs.encode("a</s>")
    assert ours.vocab_size == 500  # "<pad>" would be number 500, which the model does not have


def test_tokenizer_json_goes_before_tokenizer_model(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny.make_byte_level(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folders["sentencepiece"] / "tokenizer.model").read_bytes())
    assert type(load(tmp_path)).__name__ == "JsonTokenizer"


def test_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    tiny.write_config(tmp_path, tiny.CONFIG)
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json is damaged"),
        ("tokenizer.json", b"\xff\x00", "tokenizer.json is damaged"),
        ("tokenizer.model", b"no model", "is not a SentencePiece model"),
        ("tokenizer.model", b"", "is not a SentencePiece model"),
        ("cl100k_base.tiktoken", b"IQ== zero\n", "not lines of a base64 token and its rank"),
        ("cl100k_base.tiktoken", b"IQ== 0\n", "some bytes have no token"),
        ("cl100k_base.tiktoken", b"IQ== 0\nIg== 0\n", "two tokens have the same rank"),
        ("tokenizer_config.json", b"[]", "is not a JSON object"),
        ("tokenizer_config.json", b"\xff", "is not UTF-8"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}', "is not a table of tokens"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": {}}}', "added token 7 has no content"),
        ("added_tokens.json", b'{"<x>": "7"}', "its values are not token ids"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GateworkError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranks_that_run_into_the_special_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    ranks = (folders["cl100k"] / "cl100k_base.tiktoken").read_bytes()
    (tmp_path / "cl100k_base.tiktoken").write_bytes(ranks + b"IUhp 100257\n")
    with pytest.raises(GateworkError, match="does not fit its special tokens; got a rank of 100257"):
        load_tokenizer(tmp_path)


def test_a_missing_rank_file_says_where_to_get_it(tmp_path: Path) -> None:
    tiny.write_config(tmp_path, {"tokenizer_class": "TiktokenTokenizerWrapper"})
    with pytest.raises(GateworkError, match=r"cl100k_base.tiktoken; got no such file; fix: download https://"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("package", ["sentencepiece", "tiktoken"])
def test_a_missing_package_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    kind = "sentencepiece" if package == "sentencepiece" else "cl100k"
    with pytest.raises(GateworkError, match=rf"needs the {package} package; fix: pip install"):
        load_tokenizer(folders[kind])


def test_a_decoder_that_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.CTC()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(GateworkError, match="decoder that cannot be streamed; got CTC; expected ByteLevel"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["\ud800", 5, None])
def test_only_unicode_text_can_be_encoded(folders: dict[str, Path], text: Any) -> None:
    with pytest.raises(GateworkError, match=r"only text can be encoded|the text has no UTF-8 form"):
        load(folders["byte_level"]).encode(text)


def test_importing_the_text_edge_loads_no_tokenizer_library() -> None:
    names = "chat", "sampling", "stopping", "tokenizer"
    libraries = "jinja2", "onnx", "sentencepiece", "tiktoken", "tokenizers", "torch", "transformers"
    code = f"import sys\nfor name in {names}: __import__('gatework.runtime.' + name)\n"
    code += f"print([name for name in {libraries} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""Chat templates against transformers' apply_chat_template."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gatework.plugins.errors import GateworkError
from gatework.runtime.chat import render_chat
from gatework.runtime.tokenizer import Tokenizer, load_tokenizer
from tests import tiny_tokenizers as tiny

CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are DBRX.<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}"""

LLAMA = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}\
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}\
{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

ZEPHYR = """{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
    {% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
    {% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
    {% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

MODERN = """{%- set state = namespace(system='', turns=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set state.system = message.content %}
        {%- continue %}
    {%- endif %}
    {%- set state.turns = state.turns + 1 %}
    {%- if state.turns > 3 %}{% break %}{% endif %}
    {%- generation %}
{{ message | tojson }} {{ message | tojson(indent=2) }}
    {%- endgeneration %}
{%- endfor %}
{{ unk_token }}{{ pad_token }}{% if tools is not none %}tools{% endif %}{% if documents %}documents{% endif %}
{{ dict(a=state.system)['a'] }} {{ messages[-1].name }} {{ messages[-1].get('tool_calls') }}"""

TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "zephyr": ZEPHYR, "modern": MODERN}

USER = {"role": "user", "content": " What's <b>2 & 2</b>?\n"}
ASSISTANT = {"role": "assistant", "content": "Vier – 四 😀"}
SYSTEM = {"role": "system", "content": 'Be "brief".'}
CONVERSATIONS = {
    "one": [USER],
    "turns": [USER, ASSISTANT, USER],
    "system": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
    "further keys": [USER | {"name": "Ann", "tool_calls": None}],
}


def make(directory: Path, **config: Any) -> Tokenizer:
    tokenizer = load_tokenizer(tiny.make_byte_level(directory, **config))
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_agree_with_transformers(tmp_path: Path, template: str, conversation: str, prompt: bool) -> None:
    ours = make(tmp_path, chat_template=TEMPLATES[template])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = CONVERSATIONS[conversation]
    if template == "mistral" and conversation == "system":
        with pytest.raises(GateworkError, match=r"cannot render these messages: Only user and assistant roles"):
            render_chat(ours, messages, add_generation_prompt=prompt)
        return
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert render_chat(ours, messages, add_generation_prompt=prompt) == text
    ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert ours.encode(text, add_special_tokens=False) == ids


def test_where_templates_come_from(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "in the config"}, {"name": "tool_use", "template": "tools"}]
    assert render_chat(make(tmp_path, chat_template=named), [USER]) == "in the config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "in a JSON file"}))
    assert render_chat(make(tmp_path), [USER]) == "in a JSON file"
    (tmp_path / "chat_template.jinja").write_text("für sich", encoding="utf-8")
    assert render_chat(make(tmp_path, chat_template=named), [USER]) == "für sich"
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([USER], tokenize=False) == "für sich"


def test_special_tokens_that_only_the_vocabulary_knows(tmp_path: Path) -> None:
    tiny.make_sentencepiece(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert render_chat(tokenizer, [{"role": "user", "content": "hi"}]) == "<s>hi</s>"


def test_the_date(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, chat_template="{{ strftime_now('%Y') }}")
    assert abs(int(render_chat(tokenizer, [USER])) - datetime.now().year) <= 1


def test_missing_templates(tmp_path: Path) -> None:
    with pytest.raises(GateworkError, match="this tokenizer has no chat template; fix: "):
        render_chat(make(tmp_path), [USER])
    tools_only = make(tmp_path, chat_template=[{"name": "tool_use", "template": "tools"}])
    with pytest.raises(GateworkError, match="no chat template is the default one; got tool_use"):
        render_chat(tools_only, [USER])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "chat template is broken: .*line 1"),
        ("\n{{ 'open", "chat template is broken: .*line 2"),
        ("{{ messages | nonesuch }}", "chat template is broken: No filter named 'nonesuch'"),
        ("{{ messages[0].content.nothing.more }}", "cannot render these messages: .*has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "cannot render these messages: division by zero"),
        ("{{ raise_exception('two\nlines') }}", "cannot render these messages: two lines"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot render these messages: maximum recursion"),
        ("{% include 'other' %}", "cannot render these messages: "),
    ],
)
def test_broken_templates_are_one_line(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(GateworkError, match=message) as caught:
        render_chat(make(tmp_path, chat_template=template), [USER])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ dict.__globals__.json }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].clear() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace({'__call__': 1}) }}",
        "{{ range(10**9) }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(tmp_path: Path, template: str) -> None:
    messages = [dict(USER)]
    with pytest.raises(GateworkError, match="cannot render these messages: "):
        render_chat(make(tmp_path, chat_template=template), messages)
    assert messages == [USER]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages cannot be used"),
        ("hello", "messages cannot be used; got 'hello'"),
        (USER, "messages cannot be used"),
        (["hello"], "message 0 cannot be used; got 'hello'"),
        ([USER, {"role": "user"}], "content of message 1 cannot be used"),
        ([{"content": "hi"}], "role of message 0 cannot be used"),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "content of message 0 cannot be used"),
        ([USER | {"extra": object()}], "messages are not plain JSON"),
    ],
)
def test_malformed_messages_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    with pytest.raises(GateworkError, match=message) as caught:
        render_chat(make(tmp_path, chat_template=CHATML), messages)
    assert "\n" not in str(caught.value)

"""Chat templates of the kinds that models come with, and a tokenizer with one."""

import json
from pathlib import Path
from typing import Any

import tokenizers

QWEN = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA2 = """{% if messages[0]['role'] == 'system' -%}
    {% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{%- else -%}
    {% set loop_messages = messages %}{% set system_message = false %}
{%- endif -%}
{% for message in loop_messages -%}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {% if loop.index0 == 0 and system_message != false -%}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {%- else -%}
        {% set content = message['content'] %}
    {%- endif -%}
    {% if message['role'] == 'user' -%}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' -%}
        {{ ' ' + content.strip() + ' ' + eos_token }}
    {%- endif -%}
{% endfor -%}
"""

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +"
    " message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# What the assistant writes, marked for those who train on it; a filter and a control of loops as transformers has them.
SCORED = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% continue %}{% endif %}"
    "<|{{ message.role }}|>{{ message.content | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{% endif %}{% for message in messages %}<start_of_turn>{{ message['content'] | trim }}<end_of_turn>
{% endfor %}"""

DATED = (
    "Today is {{ strftime_now('%d %b %Y') }}.{% for message in messages %}{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
)

# As Qwen 3 does: the last answer has an empty thought before it, those before it have none.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if loop.last and message.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

END = {"__type": "AddedToken", "content": "</s>", "special": True, "normalized": False}
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Bytes as GPT-2 spells them, in words as GPT-2 cuts them, and the special tokens of all templates."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return made


def spaced_tokenizer() -> tokenizers.Tokenizer:
    """One that puts a space before each text, as LLaMA 2's does."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyzABINST[]/<>.?"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges = [("▁", "h"), ("▁h", "i"), ("▁", "▁")]
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    model = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(list(SPECIAL))
    return made


def write_folder(folder: Path, made: tokenizers.Tokenizer, template: str | None, **settings: Any) -> Path:
    """A tokenizer's files as transformers writes them, the template among the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": END}
    told |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(told | settings), encoding="utf-8")
    return folder

"""Chat templates in the manner of today's models (own wording), and one tokenizer that has the marks of all of them."""

from __future__ import annotations

import functools
from typing import Any

from tiny import SENTENCES

SPECIAL = (
    *(
        "<eos>",
        "<turn>",
        "<bos>",
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    *("<|user|>", "<|assistant|>", "<|observation|>", "<|end_of_text|>", "<|call_begin|>", "<|call_end|>"),
)
ORDINARY = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<|User|>",
    "<|Assistant|>",
)  # added, not special

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA = """<bos>{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif -%}
<|start_header_id|>system<|end_header_id|>

Today Date: {{ date_string }}

{% if tools is not none %}{% for tool in tools %}{{ tool | tojson }}

{% endfor %}{% endif %}{{ system }}<|eot_id|>
{%- for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if 'tool_calls' in m %}{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>
{%- else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

QWEN = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% set content = m.content if m.content is string else '' %}{% if m.role == 'assistant' %}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if not thought and '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif -%}
<|im_start|>assistant
{% if loop.index0 > ns.last and (loop.last or thought) %}<think>
{{ thought.strip('\\n') }}
</think>

{{ content.lstrip('\\n') }}{% else %}{{ content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{%- if (loop.first and content) or not loop.first %}{{ '\\n' }}{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

GEMMA = """<bos>{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

MISTRAL = """<bos>{% for m in messages %}{% if m.role == 'user' %}
{%- if loop.last and tools %}[TOOL_RESULTS]{{ tools | tojson }}[/TOOL_RESULTS]{% endif %}[INST] {{ m.content }}[/INST]
{%- elif m.role == 'tool' %}[TOOL_RESULTS]{"content": {{ m.content }}}[/TOOL_RESULTS]
{%- elif m.tool_calls %}{% for call in m.tool_calls %}{% if call.id | length != 9 %}{{ raise_exception('ids of 9') }}{% endif %}{% endfor -%}
[TOOL_CALLS] [{% for call in m.tool_calls %}{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}{% endfor %}]<eos>
{%- else %} {{ m.content | trim }}<eos>{% endif %}{% endfor %}"""

GLM = """{% for m in messages %}{% if m.role == 'tool' %}<|observation|>
{{ m.content }}{% else %}<|{{ m.role }}|>
{{ m.content or '' }}{% for call in m.tool_calls or [] %}
<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>{% endfor %}{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

DEEPSEEK = """<bos>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'tool' %}<|call_begin|>{{ m.content }}<|call_end|>
{%- else %}<|Assistant|>{% set content = m.content or '' %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{ content }}
{%- for call in m.tool_calls or [] %}<|call_begin|>{{ call.function.name }}{{ call.function.arguments | tojson }}<|call_end|>{% endfor %}<eos>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|Assistant|><think>
{% endif %}"""

LAST_THOUGHT = """{% for m in messages %}<turn>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}(thought)
{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<turn>assistant
{% endif %}"""

END_OF_TEXT = """{% for m in messages %}<turn>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<turn>assistant
{% else %}<|end_of_text|>{% endif %}"""

GENERATION = """{% for m in messages %}<turn>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{% if loop.last %}(thought)
{% endif %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<turn>assistant
{% endif %}"""

OPEN_GENERATION = """{% for m in messages %}<turn>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}"""

WORDS = """{% for m in messages %}### {{ m.role | title }}:
{{ m.content }}

{% endfor %}{% if add_generation_prompt %}### Assistant:
{% endif %}"""

FAMILY = {
    name.lower(): text for name, text in dict(globals()).items() if name.isupper() and isinstance(text, str)
}


@functools.cache
def _backend() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ORDINARY])
    return str(tokenizer.to_str())


def chat_tokenizer(template: str) -> Any:
    """A tokenizer with every mark of the family and this chat template; its EOS is "<eos>"."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()), eos_token="<eos>", bos_token="<bos>"
    )
    fast.chat_template = template
    return fast

"""Chat templates that behave as those of model families do, for tests. None is a copy.

SWITCHED    as Qwen3's: enable_thinking=false writes an empty block; thinking of earlier turns
            is left out
OPENED      as R1's distillations: the generation prompt ends within thinking
CHANNELS    as gpt-oss's: the system turn states reasoning_effort, answers have channels
LISTS       wants the user's content as a list of parts, and shows nothing of a string
"""

from __future__ import annotations

import copy
from typing import Any

THINK_TOKENS = ["<think>", "</think>"]
CHANNEL_TOKENS = ["<|start|>", "<|channel|>", "<|message|>", "<|return|>"]

SWITCHED = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|assistant|>\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|end|>\\n' }}
{%- else %}
{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

OPENED = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|assistant|>' + message.content.split('</think>')[-1] + '<|end|>' }}
{%- else %}
{{- '<|' + message.role + '|>' + message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>\\n' }}{%- endif %}"""

CHANNELS = """\
{{- '<|start|>system<|message|>Answer.\\nReasoning: ' + (reasoning_effort | default('medium')) }}
{{- '\\n\\n# Channels: analysis, final.<|end|>' }}
{%- for message in messages %}
{%- if message.role == 'system' %}
{{- '<|start|>developer<|message|># Instructions\\n' + message.content + '<|end|>' }}
{%- elif message.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
{{- '<|return|>' if loop.last else '<|end|>' }}
{%- else %}
{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

LISTS = """\
{%- for message in messages %}
{{- '<|' + message.role + '|>' }}
{%- for part in message.content %}
{%- if part.type == 'text' %}{{- part.text }}{%- endif %}
{%- endfor %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


def with_template(tokenizer: Any, template: str, *, tokens: list[str] | None = None) -> Any:
    """A copy of a tokenizer with a chat template, and further tokens that are not special."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    other.add_tokens(tokens or [])
    return other


def with_channels(tokenizer: Any) -> Any:
    """A copy with the template CHANNELS, whose tokens are special, as in its family."""
    other = with_template(tokenizer, CHANNELS)
    other.add_special_tokens(
        {"additional_special_tokens": CHANNEL_TOKENS}, replace_extra_special_tokens=False
    )
    other.eos_token = "<|return|>"
    return other

"""A model folder of Qwen3-4B's published shape with config.json and a tokenizer, without weights.

The template is written to behave as Qwen3's: a closed, empty thinking block ends the prompt where
`enable_thinking` is false.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
PARAMETERS = 4_022_468_096  # as the model card says: 4.0B


def write_qwen3_folder(folder: Path, tokenizer: Any, template: str = TEMPLATE) -> Path:
    """Write such a folder, with the vocabulary of `tokenizer`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer.save_pretrained(folder)
    for file in folder.glob("chat_template*"):
        file.unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder

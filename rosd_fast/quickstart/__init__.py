"""The embedded default: a tiny language model, problems it half solves, and the program that made
it.

Model and tokenizer lie in `MODEL_DIR` in Hugging Face layout. `tasks` draws the problems, `corpus`
writes the texts the model was trained on, `build` trains it and prints its figures.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
QUICKSTART = "quickstart:"  # begins the name of a split of the problems, as in quickstart:dev

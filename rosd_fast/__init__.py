"""rosd-fast: a trainer for reflective on-policy self-distillation."""

__version__ = "0.1.0"

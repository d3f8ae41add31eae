"""Reflections: ask for them, read them, filter them, and locate the first error they name."""

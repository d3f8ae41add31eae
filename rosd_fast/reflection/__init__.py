"""Reflections: request, parse and filter them, and locate the first error that they name."""

"""Data sets: rows of a file become problems."""

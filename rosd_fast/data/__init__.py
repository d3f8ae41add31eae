"""Data sets: the rows of a file become problems."""

"""Readers: each opens one kind of file, or a data set of a library, as `Rows`.

base   `Rows`, what all of them are
open   the reader of a source: `open_rows`
"""

"""Everything is declared in pyproject.toml; this file is where native extensions get built."""

from setuptools import setup

setup()

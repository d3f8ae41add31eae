"""Helpers for several packages."""

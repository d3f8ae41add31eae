"""Triton kernels of the strategies "tiled" and "chunked"."""

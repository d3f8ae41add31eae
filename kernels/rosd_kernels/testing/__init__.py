"""Checks of the kernels: acceptance on a device, ahead-of-time compilation, and baselines."""

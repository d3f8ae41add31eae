"""Rollouts: sample groups, and select those that can teach something."""

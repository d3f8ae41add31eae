"""Rollouts from SGLang servers, and a teacher that runs on one."""

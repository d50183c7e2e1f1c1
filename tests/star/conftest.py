"""Hypothesis for all tests of `star`: no deadlines (machines are busy), the same examples in every run."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("star", deadline=None, derandomize=True)
settings.load_profile("star")

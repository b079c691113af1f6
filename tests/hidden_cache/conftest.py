"""Tests here never cut the power, so fsync only has to be called, not to wait for a disk others are
using.
"""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def fsync_returns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)

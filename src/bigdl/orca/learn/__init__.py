"""Training, evaluation and prediction: programs of any framework, on any engine and data."""

from __future__ import annotations

__all__: list[str] = []

"""Functions that work on a stream of values, each in worker processes of its own.

No framework is known here; ``bigdl.nano.pytorch.inference`` sends its models through the same
stages.
"""

from __future__ import annotations

from bigdl.nano.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]

"""One training step of several workers, whatever framework makes the gradients. NumPy only.

Each worker brings gradients of its own rows; all go on with the gradient of the global batch,
as one process would have computed it. ``StepKernel`` is the only place where that is done.
"""

from __future__ import annotations

from bigdl._base.sync.alone import LoneKernel
from bigdl._base.sync.clipping import Sync
from bigdl._base.sync.gathering import gather_bytes
from bigdl._base.sync.kernel import Contribution, Outcome, StepKernel
from bigdl._base.sync.layout import Piece

__all__ = ["Contribution", "LoneKernel", "Outcome", "Piece", "StepKernel", "Sync", "gather_bytes"]

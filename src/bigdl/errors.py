"""The public home of the project's errors."""

from bigdl._base.errors import *  # noqa: F403  (the tree is drawn, and listed, there)
from bigdl._base.errors import __all__ as __all__

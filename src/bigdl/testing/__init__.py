"""Contract tests for the seams of this project, for its own and for other implementations."""

import pytest

pytest.register_assert_rewrite(
    "bigdl.testing.collective",
    "bigdl.testing.engine",
    "bigdl.testing.sharded",
    "bigdl.testing.xshards",
)

"""Data in shards, and data for estimators, on any engine. Loads no framework."""

from bigdl.orca.data.worker_values import per_worker
from bigdl.orca.data.xshards import XShards

__all__ = ["XShards", "per_worker"]

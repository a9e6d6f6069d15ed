"""Many machines: data, training, prediction and search on worker processes, Spark or Ray.

Importing this loads no framework and changes nothing.
"""

from bigdl.orca.context import OrcaContext, init_orca_context, stop_orca_context

__all__ = ["OrcaContext", "init_orca_context", "stop_orca_context"]

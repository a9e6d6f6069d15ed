"""Seamless scaling of AI pipelines, from a laptop to a cluster."""

__version__ = "3.0.0.dev0"
__all__ = ["__version__"]

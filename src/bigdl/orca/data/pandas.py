"""Readers of tables into shards of pandas frames, with pandas' names and options."""

from bigdl.orca.data.readers import read_csv, read_json, read_parquet

__all__ = ["read_csv", "read_json", "read_parquet"]

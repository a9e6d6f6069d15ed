"""Figure 10: a pandas function of the user's own on every shard."""

from __future__ import annotations

import pytest


def test_figure_10(readings):
    pd = pytest.importorskip("pandas", reason="the listing's data are frames")

    import bigdl.orca.data
    import bigdl.orca.data.pandas
    from bigdl.orca import init_orca_context, stop_orca_context

    def negative(df, column_name):
        df[column_name] = df[column_name] * (-1)
        return df

    init_orca_context(cluster_mode="local", cores=2)
    try:
        shards = bigdl.orca.data.pandas.read_csv(str(readings))
        transformed = shards.transform_shard(negative, "value")
        after = pd.concat(transformed.collect(), ignore_index=True)
        untouched = pd.concat(shards.collect(), ignore_index=True)
    finally:
        stop_orca_context()

    files = sorted(readings.glob("*.csv"))
    before = pd.concat([pd.read_csv(file) for file in files], ignore_index=True)
    pd.testing.assert_series_equal(after["value"], -before["value"])
    pd.testing.assert_frame_equal(untouched, before)  # changes in place stay in the new shards

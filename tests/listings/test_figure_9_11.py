"""Figures 9 and 11: a compiled Keras model trained on a Spark DataFrame, and its predictions."""

from __future__ import annotations

import pytest


@pytest.mark.xfail(raises=ModuleNotFoundError, strict=True, reason="bigdl.orca to come")
def test_figure_9_and_11(ratings):
    from bigdl.orca import init_orca_context, stop_orca_context
    from bigdl.orca.learn.tf2 import Estimator

    keras = pytest.importorskip("keras", reason="needs the [keras] extra")

    context = init_orca_context(cluster_mode="local", runtime="spark", cores=2)
    try:
        df = context.spark.createDataFrame(ratings).repartition(3)

        user = keras.Input((), dtype="int64", name="user")
        item = keras.Input((), dtype="int64", name="item")
        tastes = keras.layers.Embedding(int(ratings.user.max()) + 1, 8)(user)
        traits = keras.layers.Embedding(int(ratings.item.max()) + 1, 8)(item)
        hidden = keras.layers.Dense(16, activation="relu")(
            keras.layers.Concatenate()([tastes, traits])
        )
        model = keras.Model([user, item], keras.layers.Dense(1, activation="sigmoid")(hidden))
        model.compile(optimizer="adam", loss="binary_crossentropy", metrics=["accuracy"])

        est = Estimator.from_keras(keras_model=model)
        (epoch,) = est.fit(df, feature_cols=["user", "item"], label_cols=["label"])
        predicted = est.predict(df, feature_cols=["user", "item"])

        assert epoch["rows"] == len(ratings)
        assert predicted.columns == [*df.columns, "prediction"]
        table = predicted.toPandas()
        by_hand = model.predict([table.user.to_numpy(), table.item.to_numpy()], verbose=0)
        assert table.prediction.to_numpy() == pytest.approx(by_hand[:, 0], abs=1e-5)
    finally:
        stop_orca_context()

"""Figure 4: hyperparameter search of a Keras model, spaces written where values stand."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.xfail(
    raises=ModuleNotFoundError, strict=True, reason="bigdl.nano.tf and bigdl.nano.automl to come"
)
def test_figure_4(digits):
    from bigdl.nano.automl import space
    from bigdl.nano.tf.keras import Sequential
    from bigdl.nano.tf.keras.layers import Dense, Flatten

    x, y = digits
    x_train = np.pad(x, ((0, 0), (10, 10), (10, 10)))  # (rows, 28, 28), as the paper's pictures

    model = Sequential()
    model.add(Flatten(input_shape=(28, 28)))
    model.add(Dense(units=space.Categorical([64, 256]), activation="relu"))
    model.add(Dense(units=space.Int(10, 20), activation="softmax"))
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.search(
        n_trials=2,
        target_metric="val_accuracy",
        direction="maximize",
        x=x_train,
        y=y,
        validation_split=0.2,
        epochs=1,
        verbose=0,
    )
    history = model.fit(x_train, y, epochs=2, verbose=0)

    assert history.history["loss"][1] < history.history["loss"][0]
    hidden, last = model.layers[-2:]
    assert hidden.units in (64, 256)
    assert 10 <= last.units <= 20
    assert model.predict(x_train[:5], verbose=0).shape == (5, last.units)

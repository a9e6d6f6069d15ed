"""What a user hangs on to training: callbacks, run on the worker of rank 0.

Names no framework. What a callback's attributes have become comes back into the caller's object.
"""

from __future__ import annotations

from bigdl.orca.learn.callbacks.base import Callback, TrainingState
from bigdl.orca.learn.callbacks.early_stopping import EarlyStopping
from bigdl.orca.learn.callbacks.learning_rate import LearningRateMonitor
from bigdl.orca.learn.callbacks.mlflow import MLflow
from bigdl.orca.learn.callbacks.model_checkpoint import ModelCheckpoint
from bigdl.orca.learn.callbacks.progress import Progress
from bigdl.orca.learn.callbacks.tensorboard import TensorBoard

__all__ = [
    "Callback",
    "EarlyStopping",
    "LearningRateMonitor",
    "MLflow",
    "ModelCheckpoint",
    "Progress",
    "TensorBoard",
    "TrainingState",
]

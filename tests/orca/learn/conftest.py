"""Loads ``learning`` once, so that tests, and the workers they start, find it by name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

NAME = "tests.orca.learn.learning"
_spec = importlib.util.spec_from_file_location(NAME, Path(__file__).with_name("learning.py"))
_learning = importlib.util.module_from_spec(_spec)
sys.modules[NAME] = _learning
_spec.loader.exec_module(_learning)

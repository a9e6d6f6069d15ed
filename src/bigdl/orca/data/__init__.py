"""Data for estimators, on any engine. Loads no framework."""

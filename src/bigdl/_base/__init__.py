"""Ground floor: standard library and NumPy only. Imports no framework and nothing above it."""

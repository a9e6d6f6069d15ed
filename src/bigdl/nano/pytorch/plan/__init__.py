"""The measured plan of a training step: what is tried, how it is tried, what is kept."""

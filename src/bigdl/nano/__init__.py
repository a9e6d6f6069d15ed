"""One machine: training, inference and search, accelerated by changing an import."""

"""A model as what other runtimes read: its inputs, axes, structure, ONNX form."""

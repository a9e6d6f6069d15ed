"""Training in several processes of one machine: parts of batches, gradients in common."""

"""Small Mamba-2 models, trained many at once: the laboratory of training length and state size."""

"""Experiments: they ask models questions and trace them while they answer."""

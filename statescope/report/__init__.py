"""One page about one record: the verdict, the facts, the figures and how each was made."""

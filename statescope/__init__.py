"""Look inside the recurrent state of a language model while it reads."""

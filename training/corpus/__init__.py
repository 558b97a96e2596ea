"""A corpus as tokens: `mimi tokenize` and `mimi detokenize`, from a laptop to a cluster."""

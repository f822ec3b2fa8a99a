"""Studies: questions about pruning, each answered by one command on one set of statistics."""

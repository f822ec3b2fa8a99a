"""Core: the arithmetic of pruning, from moments to plans. It knows torch alone."""

"""Routing: a prompt in, its task out; and how that is learnt."""

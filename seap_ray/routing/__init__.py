"""Routing: fit a router on the prompts of the tasks, and send prompts to their experts with it."""

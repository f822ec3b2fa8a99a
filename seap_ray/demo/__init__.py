"""The built-in demo: a small Llama with six skills, the generators of its tasks, and its training script."""

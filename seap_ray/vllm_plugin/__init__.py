"""vLLM plugin: how vLLM loads and runs layers of unequal widths."""

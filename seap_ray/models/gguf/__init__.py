"""GGUF: a checkpoint of ours, dense or cut, as one file that llama.cpp loads as it is, and so Ollama and LM Studio."""

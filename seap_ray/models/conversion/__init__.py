"""Conversion: a model in a form that people have it in, into the folder of safetensors that everything else reads."""

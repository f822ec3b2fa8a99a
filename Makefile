.PHONY: install demo test test-fast check format

install: ; python3 -m seap_ray.install --extras dev,eval
demo: ; .venv/bin/python jobs/prune.py
test: ; .venv/bin/pytest
test-fast: ; .venv/bin/pytest -m "not ray and not vllm and not gpu and not slow"
check: ; .venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy
format: ; .venv/bin/ruff format . && .venv/bin/ruff check --fix .

.PHONY: install demo test test-fast check docs format matrix

install: ; python3 -m seap_ray.install --extras dev,docs,eval
demo: ; .venv/bin/python jobs/prune.py
test: ; .venv/bin/python -m pytest
test-fast: ; .venv/bin/python -m pytest -m "not ray and not vllm and not gpu and not slow"
check:
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
# The variable silences an announcement of the theme.
docs: ; NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict
format: ; .venv/bin/ruff format . && .venv/bin/ruff check --fix .
# Other releases of transformers than the environment's, by hand: some minutes each.
matrix: ; .ci/matrix $(RELEASES)

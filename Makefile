# make demo   sets up everything, runs the demo study, and prints where its report lies
# make test   sets up everything and runs the tests

PYTHON ?= python3
VENV := .venv
RUN := demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test check clean

demo: $(VENV)/ready
	$(VENV)/bin/python -m study run --preset demo --name $(RUN)
	$(VENV)/bin/python -m analysis report runs/$(RUN) --top 3

test: $(VENV)/ready-dev
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/ready-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; give one with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }

$(VENV)/ready: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/ready-dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

# make demo, make test, make lint: each sets up what it needs in .venv first.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/core.done
	$(BIN)/python search_block_kd.py --superspace onnxw --latency_constraint 10 --platform onnx_lut \
	  --latency_loss_t 0.08 --latency_loss_a 0.01 --lut_path data/block_lut --output_dir checkpoints/block_kd/search

test: $(VENV)/dev.done
	$(BIN)/python -m pytest -q --durations=10

lint: $(VENV)/dev.done
	$(BIN)/ruff check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/core.done: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev.done: requirements-dev.txt requirements.txt requirements-nn-meter.txt requirements-onnx.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

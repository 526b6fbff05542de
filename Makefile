# make demo, make test, make test-slow, make lint: each sets up what it needs in .venv first.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

.PHONY: demo test test-slow lint clean

demo: $(VENV)/demo.done
	$(BIN)/python demo.py

test: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15

test-slow: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

lint: $(VENV)/dev.done
	$(BIN)/ruff check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.done: requirements-demo.txt requirements.txt requirements-onnx.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt
	touch $@

$(VENV)/dev.done: requirements-dev.txt requirements-demo.txt requirements.txt requirements-nn-meter.txt \
  requirements-onnx.txt requirements-tflite.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

# make demo, make test, make test-slow, make bench, make lint: each sets up what it needs in .venv first.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

.PHONY: demo test test-slow bench lint clean

demo: $(VENV)/demo.done
	$(BIN)/python pipeline.py --config-file pipelines/demo.yaml

test: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
	  --max-worker-restart 0 --durations=15

test-slow: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

# one run of the benchmarks that need nothing but this repository, one thread each
bench: export OMP_NUM_THREADS = 1
bench: $(VENV)/dev.done
	$(BIN)/python benchmarks/space_search.py
	$(BIN)/python benchmarks/lut_reuse.py --teacher_archs efficientnet-lite0 --rows 1 --scale 0.04
	$(BIN)/python benchmarks/supernet_step.py --batch_size 4 --repeats 3
	$(BIN)/python benchmarks/onnx_blocks.py
	$(BIN)/python benchmarks/onnx_int8.py --runs 60
	$(BIN)/python benchmarks/compare_platforms.py --platforms epyc_zen3_ort1.32_1t onnx_lut --superspace onnxw

lint: $(VENV)/dev.done
	$(BIN)/ruff check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.done: requirements-demo.txt requirements.txt requirements-onnx.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt
	touch $@

$(VENV)/dev.done: requirements-dev.txt requirements-demo.txt requirements.txt requirements-nn-meter.txt \
  requirements-onnx.txt requirements-openvino.txt requirements-tflite.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

# make demo    restores the example pictures with the model that the repository carries, on a CPU, into results/
# make test    runs the tests and the linter
# Both set up a virtual environment in .venv first, once. By hand: pip install -r requirements.txt, then the last line
# of each rule. Another Python: make test PYTHON=/path/to/python3.12

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
IN := $(VENV)/bin/python

.PHONY: demo test slow lint picture ablation bundled gpu faults clean

demo: $(VENV)/runtime
	$(IN) eval.py examples --compare

test: $(VENV)/dev
	$(IN) -m pytest

slow: $(VENV)/dev  # official sizes: minutes to hours, and gigabytes of memory
	$(IN) -m pytest -m slow

picture: $(VENV)/runtime  # the README's, from the photos in examples/
	$(IN) -m examples.comparison

# make ablation LR=lr HR=hr DATA=hq: hours on a CPU, goes on where it was stopped; ARGS="…" for more options
ablation: $(VENV)/runtime
	$(IN) -m lab.ablation --lr $(LR) --hr $(HR) $(if $(DATA),--data $(DATA)) $(ARGS)

# make bundled HQ=./hq: the models in weights/ from photos: 30 hours of one core, estimated; goes on where it was stopped
bundled: $(VENV)/runtime
	$(IN) -m lab.bundled --data $(HQ) $(ARGS)

gpu: $(VENV)/runtime  # half an hour at most on an NVIDIA GPU, into runs/gpu; without a registry: python3 -m lab.gpu …
	for part in correctness timings training; do $(IN) -m lab.gpu $$part --out runs/gpu || exit 1; done

faults: $(VENV)/runtime  # broken inputs, killed processes, bad disks, against every command, into runs/faults
	$(IN) -m lab.faults --out runs/faults

lint: $(VENV)/dev
	$(IN) -m ruff check

clean:
	rm -rf $(VENV)

$(IN):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: requirements.txt | $(IN)
	$(IN) -m pip install -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt requirements.txt | $(IN)
	$(IN) -m pip install -r requirements-dev.txt
	touch $@

# Everything sets itself up: `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo check test test-slow docs bench bench-cifar bench-paper bench-latency bench-imagenet bench-imagenette clean

demo: .venv/ready
	$(BIN)/rankprune demo

check: .venv/ready docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Two workers of one thread each: more threads than cores would crawl.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-slow: .venv/ready
	$(BIN)/pytest -n 0 -m slow

# Into site/, for any web server or the browser; only the search needs a server, like python3 -m http.server -d site.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The CIFAR-10 table: one command a row, dense networks first, for others build on them. Days on two cores; a killed run goes on.
RUN := $(BIN)/rankprune bench run benchmarks/experiments
OURS := $(foreach row,spatial-2.17x spatial-2.84x channel-2.17x spatial-4x,resnet20-ours-$(row)) resnet32-ours-spatial-2.17x \
	resnet56-ours-spatial-2.5x
SEEDED := $(foreach net,resnet20 resnet32 resnet56,$(net)-dense $(net)-trp-spatial-nu $(net)-trp-channel-nu) \
	resnet20-trp-decoupled-nu $(foreach row,$(OURS),$(row) $(row)-distilled)
ROWS := $(notdir $(basename $(wildcard benchmarks/experiments/resnet*.toml)))
CONTINUED := %-continued-distilled
ORDERED := $(filter %-dense,$(ROWS)) $(filter-out %-dense $(CONTINUED),$(ROWS)) $(filter $(CONTINUED),$(ROWS))

bench-cifar: .venv/ready
	for row in $(ORDERED); do $(RUN)/$$row.toml || exit 1; done
	for row in $(SEEDED); do for seed in 1 2; do $(RUN)/$$row.toml --seed $$seed || exit 1; done; done
	$(BIN)/rankprune report --into README.md --plots docs/plots

# By the paper's own schedule, from scratch: 164 epochs a row, for a GPU.
PAPER := $(notdir $(basename $(wildcard benchmarks/experiments/paper-*.toml)))

bench-paper: .venv/ready
	for row in $(filter %-dense,$(PAPER)) $(filter-out %-dense,$(PAPER)); do $(RUN)/$$row.toml || exit 1; done

# ImageNet, ten epochs a row, on all GPUs of a machine.
IMAGENET := $(notdir $(basename $(wildcard benchmarks/experiments/imagenet-*.toml)))
GPUS ?= 8

bench-imagenet: .venv/ready
	for row in $(filter %-dense,$(IMAGENET)) $(filter-out %-dense,$(IMAGENET)); do $(BIN)/torchrun --nproc-per-node=$(GPUS) \
	-m rankprune bench run benchmarks/experiments/$$row.toml || exit 1; done

# Each builds on the one before: trained from scratch, trained on as long as the rest, the rest.
NETTE := $(notdir $(basename $(wildcard benchmarks/experiments/imagenette-*.toml)))
NETTE_ORDERED := $(filter %-dense,$(NETTE)) $(filter %-continued,$(NETTE)) $(filter-out %-dense %-continued,$(NETTE))

bench-imagenette: .venv/ready
	for row in $(NETTE_ORDERED); do $(RUN)/$$row.toml || exit 1; done
	$(BIN)/rankprune report --into README.md --plots docs/plots

# ResNets by the clock: half an hour, with nothing else running. CLOCKED=... writes elsewhere, what another machine measures, say.
BY_CLOCK := $(BIN)/rankprune bench latency --backend onnxruntime --rule "Budget(latency=0.5, backend='onnxruntime')" \
	--rule "Budget(macs=1/2.9)" --model rankprune.recipes.imagenet_resnet
CLOCKED ?= benchmarks/results/latency

bench-latency: .venv/ready
	$(BY_CLOCK):resnet18 --input 1,3,224,224 --rule "Budget(latency=0.36, backend='onnxruntime')" --out $(CLOCKED)-resnet18-224.json \
	--layer layer3.1.conv1 --plot docs/plots/layer-rank.svg
	$(BY_CLOCK):resnet18 --input 8,3,112,112 --rule "Budget(latency=0.33, backend='onnxruntime')" --out $(CLOCKED)-resnet18-112.json
	$(BY_CLOCK):resnet50 --input 1,3,224,224 --rule "Budget(latency=0.34, backend='onnxruntime')" --out $(CLOCKED)-resnet50-224.json
	$(BIN)/rankprune bench latency --rule "Budget(latency=0.5, backend='onnxruntime')" --rule "Budget(macs=1/2.9)" \
	--model rankprune.recipes.imagenet_resnet:resnet18 --input 1,3,224,224 --out $(CLOCKED)-resnet18-backends.json
	$(BIN)/python benchmarks/pairs.py

bench: bench-cifar bench-latency
	$(BIN)/python benchmarks/int8.py benchmarks/experiments/resnet20-ours-spatial-2.84x-distilled.toml
	$(BIN)/python benchmarks/roofline.py benchmarks/experiments/resnet20-ours-spatial-2.84x-distilled.toml
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/projection.py --growth
	$(BIN)/python benchmarks/distributed.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv

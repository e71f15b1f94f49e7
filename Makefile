# Everything sets itself up: `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo check test test-slow docs bench bench-cifar bench-paper bench-latency bench-imagenet bench-imagenette weights clean

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

# Experiments by name. One command runs one; a killed one goes on. Those that others build on come first: dense networks, these trained
# on, what starts from them, and what goes on from that.
RUN := $(BIN)/rankprune bench run benchmarks/experiments
REPORT := $(BIN)/rankprune report --into README.md --plots docs/plots
CONTINUED := %-continued %-continued-distilled
named = $(sort $(notdir $(basename $(wildcard benchmarks/experiments/$1.toml))))
in_order = $(filter %-dense,$1) $(filter %-dense-continued,$1) $(filter-out %-dense $(CONTINUED),$1) \
	$(filter-out %-dense-continued,$(filter $(CONTINUED),$1))

# The CIFAR-10 table, days on two cores. Three seeds of the dense networks, of the nuclear term and of ours by MACs. What is done is
# not done again: dense networks of all seeds come first, for some rows learn from three.
ROWS := $(call named,resnet*)
SEEDED := $(filter resnet20-dense resnet32-dense resnet56-dense %-nu,$(ROWS)) \
	$(foreach net,resnet20 resnet32 resnet56,$(filter $(net)-ours-spatial-% $(net)-ours-channel-% $(net)-ours-auto-%,$(ROWS)))

bench-cifar: .venv/ready
	for row in $(filter %-dense,$(SEEDED)); do for seed in 0 1 2; do $(RUN)/$$row.toml --seed $$seed || exit 1; done; done
	for row in $(call in_order,$(ROWS)); do $(RUN)/$$row.toml || exit 1; done
	for row in $(SEEDED); do for seed in 1 2; do $(RUN)/$$row.toml --seed $$seed || exit 1; done; done
	$(REPORT)

# The dense networks behind the table that are kept here, to where the rows that learn from them or are compared with them look.
weights:
	for file in benchmarks/weights/*.safetensors; do run=runs/$$(basename $$file .safetensors); \
	mkdir -p $$run && { [ -e $$run/dense.safetensors ] || cp $$file $$run/dense.safetensors; } || exit 1; done

# By the paper's own schedule, from scratch: 164 epochs a row, for a GPU.
bench-paper: .venv/ready
	for row in $(call in_order,$(call named,paper-*)); do $(RUN)/$$row.toml || exit 1; done
	$(REPORT)

# ImageNet, ten epochs a row, on all GPUs of this machine or on as many as GPUS says.
GPUS ?= gpu

bench-imagenet: .venv/ready
	for row in $(call in_order,$(call named,imagenet-*)); do $(BIN)/torchrun --nproc-per-node=$(GPUS) \
	-m rankprune bench run benchmarks/experiments/$$row.toml || exit 1; done
	$(REPORT)

# Imagenette, ten classes of ImageNet: a network trained from scratch, and what builds on it. A day on two cores.
bench-imagenette: .venv/ready
	for row in $(call in_order,$(call named,imagenette-*)); do $(RUN)/$$row.toml || exit 1; done
	$(REPORT)

# ResNets by the clock: half an hour, with nothing else running. CLOCKED=... writes elsewhere, what another machine measures, say.
BY_CLOCK := $(BIN)/rankprune bench latency --backend onnxruntime --rule "Budget(latency=0.5, backend='onnxruntime')" \
	--rule "Budget(macs=1/2.9)" --model rankprune.recipes.imagenet_resnet
CLOCKED ?= benchmarks/results/latency

bench-latency: .venv/ready
	$(BY_CLOCK):resnet18 --input 1,3,224,224 --rule "Budget(latency=0.36, backend='onnxruntime')" --out $(CLOCKED)-resnet18-224.json \
	--layer layer3.1.conv1 --plot $(if $(filter file,$(origin CLOCKED)),docs/plots/layer-rank.svg,$(CLOCKED)-layer-rank.svg)
	$(BY_CLOCK):resnet18 --input 8,3,112,112 --rule "Budget(latency=0.33, backend='onnxruntime')" --out $(CLOCKED)-resnet18-112.json
	$(BY_CLOCK):resnet50 --input 1,3,224,224 --rule "Budget(latency=0.34, backend='onnxruntime')" --out $(CLOCKED)-resnet50-224.json
	$(BIN)/rankprune bench latency --rule "Budget(latency=0.5, backend='onnxruntime')" --rule "Budget(macs=1/2.9)" \
	--model rankprune.recipes.imagenet_resnet:resnet18 --input 1,3,224,224 --out $(CLOCKED)-resnet18-backends.json
	$(BIN)/python benchmarks/pairs.py $(if $(filter file,$(origin CLOCKED)),benchmarks/results/pairs.json,$(CLOCKED)-pairs.json)

bench: bench-cifar bench-imagenette bench-latency
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

# The two commands of the README: `make demo` and `make test`. Each installs what it needs.
SHELL := /bin/bash
TARGET := $(shell rustc -vV | sed -n 's/^host: //p')
BIN := target/$(TARGET)/release/agent-sidecar
CLI := .cache/cli/new/node_modules/@anthropic-ai/claude-code-linux-x64/claude
# What ships, static and optimised, is what the black-box, live and install tests run.
export CARGO_BUILD_TARGET := $(TARGET)
# A static program relocates itself; packed, that table is a hundredth (400 kB less). C libraries before glibc 2.36 cannot read it.
export RUSTFLAGS := -C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs
export AGENT_SIDECAR_BIN := $(CURDIR)/$(BIN)
# Outside of containers size is nothing: what its own tests are built with is quick enough, and needs no build of its own.
export AGENT_FLEET_BIN := $(CURDIR)/target/$(TARGET)/debug/agent-fleet

.PHONY: demo test ready beside rest build install lint tests unit live containers fleet deploy alerts dashboards docs bench clean

## The real CLI under the sidecar, on a scripted API on loopback: `make demo`, or with a key `make demo LIVE=1`. `make demo STACK=1` leaves agents
## running, and a Prometheus with the alerts' rules that scrapes them.
demo: build
	tests/install $(if $(STACK),stack,cli)
	$(if $(STACK),tests/stack start $(CLI) $(BIN),$(if $(LIVE),$(BIN) demo --live --cli $(CLI),tests/loopback $(BIN) demo --cli $(CLI)))

## Every test.
test: ready unit live containers beside

# Side by side: what ships is built on one core for the most part, and downloads wait for others.
ready:
	$(MAKE) --jobs 4 --output-sync=target build install lint tests

# The alerts' suite mostly waits: the last ones go on meanwhile.
beside:
	$(MAKE) --jobs 2 --output-sync=target alerts rest

rest:
	$(MAKE) --jobs 1 fleet deploy dashboards

build:
# Alone: what the fleet asks of their common dependencies would make it larger.
	cargo build --release --locked -p agent-sidecar

install:
	tests/install all

lint:
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

# The fleet's program, too, which other suites start.
tests:
	cargo test --locked --workspace --no-run

unit: build install tests
	tests/unit

live: build install tests
# Two CLIs at a time for two cores. What they are late for on a busy machine is asked again, twice at most, and said in the closing line.
	tests/live/run -n 2 --reruns 2 -q -rfER

containers: build install
	tests/containers/run -n 2 --reruns 1 -q -rfER

# The fleet's providers, on a real daemon.
fleet: install tests
	tests/fleet/run -n 2 --reruns 1 -q -rfER

# What is in deploy/, as far as it can be tried on one machine.
deploy: build install tests
	tests/deploy/run -n 2 --dist loadfile --reruns 1 -q -rfER

alerts: build install tests
# The live run mostly waits; what is checked without it goes on beside.
	tests/alerts/run -n 2 --dist loadfile --reruns 1 -q -rfER

dashboards: build install tests
	tests/dashboards/run --reruns 1 -q -rfER

## The generated pages.
docs: build
	$(BIN) catalog --format markdown > docs/metrics.md
	$(BIN) check --format markdown > docs/settings.md
	cargo run -q -p agent-fleet -- catalog > docs/fleet-metrics.md
	deploy/kubernetes/components/monitoring/prometheusrule > deploy/kubernetes/components/monitoring/prometheusrule.yaml
	cargo run -q -p agent-sidecar-core --example detectors < docs/detectors.md > docs/detectors.new && mv docs/detectors.new docs/detectors.md

bench: export AGENT_FLEET_BIN := $(CURDIR)/target/$(TARGET)/release/agent-fleet
bench: build install
	cargo build --release --locked -p agent-fleet
	benches/run

clean:
	cargo clean
	rm -rf .cache

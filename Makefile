# `make` lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c

CARGO ?= cargo
INSTALL ?= install
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
DESTDIR ?=
ARGS ?=
FUZZ_SECONDS ?= 30

TARGET := $(or $(CARGO_TARGET_DIR),target)
TCPAUSE := $(TARGET)/release/tcpause
BIN := $(DESTDIR)$(PREFIX)/bin/tcpause
MAN := $(DESTDIR)$(PREFIX)/share/man/man1/tcpause.1
BASH := $(DESTDIR)$(PREFIX)/share/bash-completion/completions/tcpause
ZSH := $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_tcpause
FISH := $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/tcpause.fish
UNITS := $(DESTDIR)$(PREFIX)/lib/systemd/system
CONFIG := $(DESTDIR)$(SYSCONFDIR)/tcpause/tcpause.yml

.DEFAULT_GOAL := help
.PHONY: help demo run build test test-pipes test-unprivileged fuzz soak bench bench-peers bench-upgrade lint loom mutants doc check install uninstall deb clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## See a server restarted behind the proxy, in ten seconds
	@$(TCPAUSE) demo

run: build ## Run the proxy: make run ARGS="--upstream-addr localhost:5432"
	$(TCPAUSE) $(ARGS)

build: ## Build the release binary
	$(CARGO) build --release --locked

test: ## Run the tests
	$(CARGO) test --locked --workspace

# These have bytes that may go through a pipe, and do not say themselves how many pipes there are.
PIPED := relay::carry relay::pacing relay::stalled regression:: control::api pause::drain pause::exact pause::hold reject::plain \
	load::deploy load::kinds load::maintenance load::stop::a_stop load::volume upgrade::standstill upgrade::traffic

test-pipes: ## Run the tests that move bytes without pipes, and with one for each worker
	TCPAUSE_PIPES=0 $(CARGO) test --locked --test integration -- $(PIPED)
	TCPAUSE_PIPES=1 $(CARGO) test --locked --test integration -- $(PIPED)

# That user may not see the source and the packages, which some tests look at. The rest of these takes long, and neither
# opens files, sockets, pipes or threads up to a limit, nor asks whose they are.
SAME_FOR_ALL := meta:: control::abuse control::page fleet:: load::chaos load::kinds load::maintenance load::soak load::stop pause::drain \
	pause::exact pause::pace process::cli::the_demo reject:: relay::streams upgrade::crash upstream::connect upstream::dead_addresses \
	upstream::retry

test-unprivileged: ## Run the tests that privileges matter to as a user without any
	$(CARGO) test --locked --test integration --config "target.'cfg(unix)'.runner = '.ci/unprivileged'" -- $(SAME_FOR_ALL:%=--skip %)

fuzz: ## Fuzz each parser for half a minute: make fuzz FUZZ_SECONDS=30
	.ci/fuzz $(FUZZ_SECONDS)

soak: ## Run five million seeds, the load tests in their long forms, and an hour of chaos
	TCPAUSE_SEEDS=5000000 $(CARGO) test --locked -p tcpause-simulation -- --nocapture
	TCPAUSE_SCALE=soak $(CARGO) test --locked --release --test integration -- load:: control::flood reject pause:: relay::vanished --nocapture --test-threads=1

bench: ## Compare the relay with a direct connection, time a resume and the gate (five minutes)
	$(CARGO) bench --locked --bench relay --bench pause

bench-peers: ## Compare the CPU time with other proxies on this machine (ten minutes)
	$(CARGO) bench --locked --bench peers

bench-upgrade: ## Time the stall of an upgrade with 9,000 pairs of connections, and let no traffic fail (two minutes)
	$(CARGO) bench --locked --bench upgrade

# The targets compile the sources of src anew. With a path to libFuzzer, though nothing is there, no C++ compiler is needed.
lint: ## Check the format and the lints
	$(CARGO) fmt --all --check
	$(CARGO) fmt --check --manifest-path tests/fuzz/Cargo.toml
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked -p tcpause-simulation --lib --tests -- -D warnings
	CUSTOM_LIBFUZZER_PATH=none/libfuzzer.a $(CARGO) check --locked --manifest-path tests/fuzz/Cargo.toml --target-dir $(TARGET)

# Link-time optimisation would cost a minute and find nothing.
loom: ## Try every interleaving of the gate, of its fence and of the barrier
	RUSTFLAGS="--cfg loom" CARGO_PROFILE_RELEASE_LTO=off $(CARGO) test --locked --release --lib --target-dir $(TARGET)/loom -- pause::gate pause::fence pause::barrier

mutants: ## Demand that the tests of gate, fence, barrier and worker kill their mutants (ten minutes)
	.ci/loom-mutants
	.ci/worker-mutants

doc: ## Build the documentation of the library
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --lib

check: lint test loom doc ## All that must pass before a commit

# Without a prerequisite, so that `sudo make install` compiles nothing as root.
install: ## Install what `make build` has built: PREFIX=/usr/local DESTDIR=
	@test -x $(TCPAUSE) || { echo "There is no $(TCPAUSE) yet: run make build first." >&2; exit 1; }
	$(INSTALL) -D -m 755 $(TCPAUSE) $(BIN)
	$(TCPAUSE) man | $(INSTALL) -D -m 644 /dev/stdin $(MAN)
	$(TCPAUSE) completion bash | $(INSTALL) -D -m 644 /dev/stdin $(BASH)
	$(TCPAUSE) completion zsh | $(INSTALL) -D -m 644 /dev/stdin $(ZSH)
	$(TCPAUSE) completion fish | $(INSTALL) -D -m 644 /dev/stdin $(FISH)
	$(TCPAUSE) unit service | $(INSTALL) -D -m 644 /dev/stdin $(UNITS)/tcpause.service
	$(TCPAUSE) unit socket | $(INSTALL) -D -m 644 /dev/stdin $(UNITS)/tcpause.socket
	$(TCPAUSE) unit template | $(INSTALL) -D -m 644 /dev/stdin $(UNITS)/tcpause@.service
	test -e $(CONFIG) || $(INSTALL) -D -m 644 tcpause.yml $(CONFIG)

uninstall: ## Remove what was installed, but for the configuration
	rm -f $(BIN) $(MAN) $(BASH) $(ZSH) $(FISH) $(UNITS)/tcpause.service $(UNITS)/tcpause.socket $(UNITS)/tcpause@.service

deb: build ## Build a Debian package, with cargo-deb
	.ci/package release

clean: ## Remove what was built
	$(CARGO) clean

# Everything that is done with this checkout. All of it runs as root on Debian 12 (amd64) with Rust;
# what else is needed is downloaded into .lab (VMFERRY_LAB), once.
#
#   make demo      two hosts, a real guest moved between them, and the proofs     KEEP=1 leaves it up
#   make cast      the demo recorded: docs/demo.cast
#   make demo-end  ends what KEEP=1 left
#   make test      format, lints, all tests, with both QEMUs                      T=name: only that test
#   make lint      format, lints, and what deny.toml says of dependencies
#   make model     the session protocol against its model, many more steps        STEPS=n
#   make fuzz     every parser under libFuzzer, FUZZ_SECONDS for each: tests/fuzz/README.md       T="names": only these
#   make judges   openssl, sslyze, tlsfuzzer and schemathesis against an agent: docs/judges.md
#   make observe   a real Prometheus on two agents: metrics, rules, alerts, every panel: tests/observe
#   make attacks  what attacks cost honest streams, on a quiet machine: docs/security.md
#   make chaos     hundreds of faults in real migrations: tests/CHAOS.md         CHAOS_SEED=n CHAOS_INJECTIONS=n CHAOS_STAGES=n
#   make libvirt   libvirt's own migrations, every option and many faults, about 25 minutes       T=name: only that test
#   make fleet     a host with eight guests emptied while a peer and the agent fail: docs/drain.md
#   make ansible   the Ansible collection on two machines with a real systemd: docs/orchestrators.md
#   make arm       whether it builds for aarch64, and a guest of QEMU's virt machine moved: docs/disks.md
#   make newcomer  README's five minutes, literally, on fresh machines: docs/newcomer.md is what came of it
#   make orchestrators  the manifests for Kubernetes and Nomad, and the agent in a container as they have it: docs/orchestrators.md
#   make versions  moves between all pairs of QEMU 7.2, 10 and the newest of Debian's suites: docs/disks.md       T=name: only that
#   make bench     the benchmarks, about 40 minutes on a quiet machine: bench/RESULTS.md
#   make packages  the .deb and the .rpm in target/packages, judged by lintian, and lived through under a real systemd: install,
#                  move, upgrade in mid-migration, remove, purge: deploy/README.md
#   make book      the documentation as a site: target/book/site/index.html
#   make sbom      what is in the program: vmferry.cdx.json (CycloneDX)
#   make reproducible   whether two builds in two folders are the same byte for byte: docs/security.md
#   make bench-libvirt   a domain of a real libvirt moved by its own TLS, its tunnel, relays and vmferry: bench/LIBVIRT.md
#   make setup     what the tests need and the machine lacks
#   make clean-lab forgets all downloads

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: ansible arm book cast disks demo demo-end test lint format dependencies model fuzz judges observe attacks chaos libvirt fleet newcomer orchestrators versions bench bench-libvirt packages reproducible sbom setup fetch tools clean-lab
MAKEFLAGS += --no-print-directory

LAB := $(or $(VMFERRY_LAB),$(CURDIR)/.lab)
# What the tests of the QMP client alone run.
export VMFERRY_QEMU72 ?= $(LAB)/qemu72/bin/qemu-system-x86_64
export VMFERRY_QEMU10 ?= $(LAB)/qemu10/bin/qemu-system-x86_64

STEPS ?= 3000000
# All pairs of fault and phase, those around the hand-over twice: 38 x 11.
CHAOS_INJECTIONS ?= 418
# Side by side: most of a fault is waited for.
CHAOS_STAGES ?= 2
CHAOS_SEED := $(or $(CHAOS_SEED),$(shell od -An -N4 -tu4 /dev/urandom | tr -d ' '))
LOCKED := --locked
step = @printf '\n== %s\n' "$(1)"

# The tests are compiled by Clippy's compiler, which lints what it compiles: lints cost no build of
# their own. It leaves out the optimisations of MIR, which these builds can do without.
test: export RUSTC_WORKSPACE_WRAPPER := clippy-driver
test: export CLIPPY_ARGS := -D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__
# Tests that run real QEMUs in network namespaces are all in tests/real: so many at a time.
# One that missed the moment for which it waited is run once more, alone, and told.
REAL_THREADS ?= 2
test: export CHAOS_STAGES := $(CHAOS_STAGES)
test: setup format dependencies
	$(call step,build and lints)
	cargo test $(LOCKED) --workspace --all-targets --no-run
	printf '\n== unit tests\n'
	cargo test $(LOCKED) --workspace --lib --bins -- $(T)
	printf '\n== quick tests\n'
	cargo test $(LOCKED) --no-fail-fast --workspace --test mux --test handover --test quick --test tidy -- $(T)
	printf '\n== tests with real QEMUs\n'
	tests/setup/once_more.sh $(LOCKED) --workspace --test real -- --test-threads=$(REAL_THREADS) $(T)
	printf '\n== tests with a real libvirt\n'
	cargo test $(LOCKED) --workspace --test libvirt -- --test-threads=1 $(T)

lint: format dependencies
	$(call step,lints)
	cargo clippy $(LOCKED) --workspace --all-targets -- -D warnings

dependencies: fetch
	$(call step,dependencies: deny.toml)
	if ! cargo deny --version >/dev/null 2>&1; then
	  echo "NOT CHECKED: cargo-deny is not here (cargo install --locked cargo-deny)"
	else
	  cargo deny --locked check licenses bans sources
	  if cargo deny fetch db; then cargo deny --locked check advisories
	  else echo "NOT CHECKED: the list of advisories cannot be fetched"; fi
	fi

format: fetch
	$(call step,format)
	cargo fmt --version >/dev/null && clippy-driver --version >/dev/null || { echo "no rustfmt or Clippy: rustup component add rustfmt clippy" >&2; exit 1; }
	cargo fmt --check

demo: setup
	$(call step,building)
	cargo build $(LOCKED) --release --bins --example demo
	cargo run $(LOCKED) --release --quiet --example demo -- $(if $(filter-out 0,$(KEEP)),--keep)

cast: setup
	$(call step,the demo as a recorded terminal: docs/demo.cast)
	tests/setup/packages.sh asciinema:asciinema
	cargo build $(LOCKED) --release --bins --example demo
	asciinema rec --overwrite -q --cols 110 --rows 42 -i 2 -t "make demo" --env TERM -c "cargo run $(LOCKED) --release --quiet --example demo" docs/demo.cast

demo-end:
	@cargo run $(LOCKED) --release --quiet --example demo -- --end

model: fetch
	$(call step,session protocol against its model: $(STEPS) steps)
	VMFERRY_MODEL_STEPS=$(STEPS) cargo test $(LOCKED) --release -p vmferry-mux

fuzz: fetch
	$(call step,every parser of foreign bytes under libFuzzer: tests/fuzz/README.md)
	tests/fuzz/fuzz.sh run $(T)

judges: fetch
	$(call step,programs of other people against an agent: docs/judges.md)
	cargo build $(LOCKED) --bins
	tests/judges/judges.sh $(T)

observe: setup
	$(call step,a real Prometheus scrapes two real agents while a guest moves)
	tests/setup/prometheus.sh
	tests/setup/otlp.sh
	cargo build $(LOCKED) --bins
	python3 tests/observe/observe.py target/debug/vmferry $(LAB) .

attacks: setup
	$(call step,honest streams and migrations beside attacks)
	cargo test $(LOCKED) --release --test quick -- --ignored --nocapture attacks::speed
	cargo test $(LOCKED) --release --test real -- --ignored --nocapture attacked::

chaos: setup
	$(call step,$(CHAOS_INJECTIONS) faults in real migrations, seed $(CHAOS_SEED): tests/CHAOS.md)
	CHAOS_SEED=$(CHAOS_SEED) CHAOS_INJECTIONS=$(CHAOS_INJECTIONS) CHAOS_STAGES=$(CHAOS_STAGES) tests/setup/chaos.sh

libvirt: setup
	$(call step,domains of a real libvirt on two hosts: tests/libvirt)
	tests/setup/relays.sh
	tests/setup/libvirt-newer.sh 11
	tests/setup/libvirt-newer.sh newest
	cargo test $(LOCKED) --test libvirt -- --include-ignored --test-threads=1 $(T)

fleet: setup
	$(call step,a host with eight guests is emptied: docs/drain.md)
	cargo test $(LOCKED) --test real -- --ignored --test-threads=1 drain::

newcomer: setup
	$(call step,README's five minutes on fresh machines: docs/newcomer.md)
	tests/setup/packages.sh mmdebstrap:mmdebstrap
	tests/setup/debian.sh
	cargo build $(LOCKED) --bins
	python3 -B tests/newcomer/newcomer.py target/debug/vmferry $(LAB) . docs/newcomer.md

orchestrators: setup
	$(call step,manifests for Kubernetes and Nomad: docs/orchestrators.md)
	tests/setup/packages.sh mmdebstrap:mmdebstrap runc:runc /usr/share/containers/seccomp.json:golang-github-containers-common
	tests/setup/debian.sh
	tests/setup/python.sh orchestrators
	cargo build $(LOCKED) --bins
	$(LAB)/orchestrators/venv/bin/python -B tests/orchestrators/orchestrators.py target/debug/vmferry $(LAB) .

ansible: setup
	$(call step,the Ansible collection on two machines with a real systemd: docs/orchestrators.md)
	tests/setup/packages.sh pkaction:polkitd /usr/lib/python3/dist-packages/apt:python3-apt
	tests/setup/python.sh ansible
	cargo build $(LOCKED) --bins
	python3 -B tests/ansible/ansible.py target/debug/vmferry $(LAB) .

disks: setup
	$(call step,more ways of moving disks: docs/disks.md)
	tests/setup/packages.sh swtpm:swtpm chrt:util-linux taskset:util-linux
	tests/setup/arm.sh
	cargo test $(LOCKED) --test real -- --ignored --test-threads=1 $(or $(T),disks::)

arm: setup
	$(call step,for Arm)
	tests/setup/packages.sh aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu aarch64-linux-gnu-gcc:libc6-dev-arm64-cross
	rustup target add aarch64-unknown-linux-gnu
	CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc AR_aarch64_unknown_linux_gnu=aarch64-linux-gnu-ar \
	  cargo check $(LOCKED) --target aarch64-unknown-linux-gnu --bins
	tests/setup/arm.sh
	cargo test $(LOCKED) --test real -- --ignored --test-threads=1 disks::arm

versions: setup
	$(call step,moves between all pairs of three QEMUs: docs/disks.md)
	tests/setup/qemu11.sh
	tests/setup/arm.sh 11
	cargo test $(LOCKED) --test real -- --ignored --test-threads=1 $(or $(T),versions::)

bench: setup
	$(call step,two agents against plain copies and what people use; real QEMUs against their own TLS: bench/RESULTS.md)
	bench/run.sh

packages: setup
	$(call step,packages: target/packages)
	tests/setup/packages.sh lintian:lintian rpmbuild:rpm pkaction:polkitd
	cargo build $(LOCKED) --release --bins
	rm -rf target/packages
	deploy/package/build.sh target/release/vmferry target/packages
	lintian --allow-root --fail-on error target/packages/*.deb
	VMFERRY_PACKAGED=$(CURDIR)/target/release/vmferry cargo test $(LOCKED) --test real -- --include-ignored --test-threads=1 package::

# The tool is built once, in some minutes. Pages lie as in the checkout, so that their links hold.
BOOK_TOOL := $(LAB)/tools/mdbook-0.5.0
BOOK := target/book
book:
	$(call step,documentation as a site: $(BOOK)/site/index.html)
	@. tests/setup/shell.sh
	[ -x $(BOOK_TOOL)/bin/mdbook ] || retry 3 cargo install --locked --root $(BOOK_TOOL) mdbook@0.5.0
	rm -rf $(BOOK)
	mkdir -p $(BOOK)/pages
	cp --parents README.md ARCHITECTURE.md LICENSE-* docs/*.md docs/*.png docs/*.cast certs/README.md bench/*.md tests/CHAOS.md $(BOOK)/pages
	cp -r deploy $(BOOK)/pages
	cp docs/book.toml $(BOOK)
	sed 's|](\.\./|](|; t; s|](|](docs/|' docs/SUMMARY.md >$(BOOK)/pages/SUMMARY.md
	rm $(BOOK)/pages/docs/SUMMARY.md
	$(BOOK_TOOL)/bin/mdbook build $(BOOK)

# The tool is built once, in some minutes.
SBOM_TOOL := $(LAB)/tools/cargo-cyclonedx-0.5.9
sbom: fetch
	$(call step,what is in the program: vmferry.cdx.json)
	@. tests/setup/shell.sh
	[ -x $(SBOM_TOOL)/bin/cargo-cyclonedx ] || retry 3 cargo install --locked --root $(SBOM_TOOL) cargo-cyclonedx@0.5.9
	epoch=$$(git log -1 --format=%ct 2>/dev/null || echo 0)
	SOURCE_DATE_EPOCH=$$epoch $(SBOM_TOOL)/bin/cargo-cyclonedx cyclonedx --quiet --format json --spec-version 1.5 --describe binaries --target x86_64-unknown-linux-gnu
	sed 's|path+file://$(CURDIR)|path+file:///vmferry|' vmferry_bin.cdx.json >vmferry.cdx.json
	rm vmferry_bin.cdx.json

reproducible: fetch
	$(call step,the program built twice: docs/security.md)
	deploy/package/reproducible.sh

bench-libvirt: setup
	$(call step,a domain of a real libvirt moved in different ways: bench/LIBVIRT.md)
	bench/run.sh --libvirt

setup: fetch
	@tests/setup/qemu.sh
	tests/setup/guest.sh
	tests/setup/libvirt.sh
	tests/setup/etcd.sh

# The compiler needs a linker, so the machine's packages come first.
fetch: tools
	@. tests/setup/shell.sh
	retry 6 cargo fetch $(LOCKED) --target x86_64-unknown-linux-gnu

tools:
	@tests/setup/packages.sh

clean-lab:
	rm -rf "$${VMFERRY_LAB:-.lab}"

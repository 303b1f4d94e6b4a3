# Every target works on a fresh clone: what it needs is set up first, into .venv.
.DEFAULT_GOAL := help
PORT ?= 8080
STANDBY_PORT ?= 8081
ARGS ?=
SEEDS ?= 100
MINUTES ?= 10
BIN := .venv/bin
RUN := .venv/run.stamp
DEV := .venv/dev.stamp
BAILEYS := daemon/bridge/node/node_modules/.package-lock.json

help: ## show what can be made here
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

setup: $(DEV) ## set up .venv with everything that running and testing needs
	@echo "Ready: .venv, with the watchkeeper command in .venv/bin."

setup-whatsapp: $(BAILEYS) ## install Baileys for the connector to the real WhatsApp (needs Node.js 20 or later)
	@echo "Ready: Baileys, in daemon/bridge/node. Set WATCHKEEPER_CONNECTOR=baileys to use it."

run: $(RUN) ## start one instance on 127.0.0.1:8080 (SQLite, loopback WhatsApp); PORT=… for another
	@exec deploy/dev/run.sh a $(PORT)

run-standby: $(RUN) ## start a second instance that stands by, on port 8081; STANDBY_PORT=…
	@exec deploy/dev/run.sh b $(STANDBY_PORT)

run-whatsapp: $(RUN) $(BAILEYS) ## start one instance for the real WhatsApp, to link a phone with; PORT=…
	@exec deploy/dev/run.sh a $(PORT) baileys

demo-whatsapp: $(RUN) $(BAILEYS) ## redeploys and a crash under traffic, with the real Baileys and no phone
	@$(BIN)/python -m tests.whatsapp.demo

test: $(DEV) ## run the tests and 100 simulated worlds (under 5 minutes); ARGS="-k lease" for some tests
	@deploy/dev/test.sh $(ARGS)

test-long: $(DEV) ## run the longer suites that `make test` leaves out
	@$(BIN)/pytest -m long $(ARGS)

system-test: $(DEV) ## run the tests that start real processes, the long ones too
	@$(BIN)/pytest -m system $(ARGS)

simulate: $(DEV) ## run simulated worlds: SEEDS=100 MINUTES=10; docs/simulation.md
	@$(BIN)/python -m tests.simulation --seeds $(SEEDS) --minutes $(MINUTES) $(ARGS)

torture: $(DEV) ## break real processes on a real emulator: MINUTES=10 SEED=…; docs/torture.md
	@$(BIN)/python -m tests.torture --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

mutants: $(DEV) ## see that the simulation catches every deliberate mistake; writes their table
	@$(BIN)/python -m tests.simulation --mutants $(ARGS)

check: $(DEV) ## format, lint, types, layers, generated docs: everything but the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py tests/test_house.py
	$(BIN)/python -m daemon.generate_docs --check

format: $(DEV) ## format the code and mend what the linter can mend
	@$(BIN)/ruff check --fix-only . && $(BIN)/ruff format .

bench: $(DEV) ## measure, and print the figures as a table and as JSON; ARGS=--quick
	@$(BIN)/python -m bench $(ARGS)

bench-whatsapp: $(DEV) $(BAILEYS) ## measure sends through the real Baileys, beside bare Baileys; ARGS=--quick
	@$(BIN)/python -m bench.whatsapp $(ARGS)

docs: $(DEV) ## generate the pages in docs/ that are made from the code
	@$(BIN)/python -m daemon.generate_docs

lock: $(DEV) ## bring the lock files up to date with pyproject.toml; ARGS=--upgrade for newer versions
	@BIN=$(BIN) deploy/dev/lock.sh $(ARGS)

install-systemd: ## install as systemd services (as root): PREFIX=/opt/watchkeeper SYSCONFDIR=/etc DESTDIR=
	@PYTHON="$(PYTHON)" PREFIX="$(PREFIX)" SYSCONFDIR="$(SYSCONFDIR)" DESTDIR="$(DESTDIR)" \
		deploy/systemd/install.sh install

uninstall-systemd: ## take the services and the program away; settings, secrets and accounts stay
	@PREFIX="$(PREFIX)" SYSCONFDIR="$(SYSCONFDIR)" DESTDIR="$(DESTDIR)" deploy/systemd/install.sh uninstall

ci: ## run what CI runs, as CI runs it
	@.ci/run

clean: ## remove what was set up, built or cached; the accounts of `make run` in .run/ stay
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN): requirements.lock pyproject.toml deploy/dev/setup.sh
	@deploy/dev/setup.sh requirements.lock && touch $(RUN)

$(DEV): requirements.lock requirements-dev.lock pyproject.toml deploy/dev/setup.sh
	@deploy/dev/setup.sh requirements-dev.lock && touch $(RUN) $(DEV)

$(BAILEYS): daemon/bridge/node/package-lock.json daemon/bridge/node/package.json | $(RUN)
	@$(BIN)/watchkeeper setup-whatsapp && touch $(BAILEYS)

.PHONY: help setup setup-whatsapp run run-standby run-whatsapp demo-whatsapp test test-long system-test simulate mutants torture check format bench bench-whatsapp docs lock install-systemd uninstall-systemd ci clean

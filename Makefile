# What there is to do: make help.

PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc
FUZZTIME   ?= 1m

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
# Where Go's own archive installs it; sudo may not have it in PATH.
export PATH := $(PATH):/usr/local/go/bin

MODULE      := github.com/table-allocator/table-allocator
COMMANDS    := table-allocator-server table-allocator-client
PACKAGES    := $(COMMANDS:%=./cmd/%)
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GOBUILD     := go build -trimpath -buildvcs=false
LDFLAGS     := -X $(MODULE)/internal/cli.version=$(VERSION)
STATIC      := CGO_ENABLED=0 $(GOBUILD) -ldflags "-s -w $(LDFLAGS)"
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The end-to-end tests run these commands instead of building their own.
export TABLE_ALLOCATOR_BIN        := $(CURDIR)/bin/race
export TABLE_ALLOCATOR_STATIC_BIN := $(CURDIR)/bin

.PHONY: build help demo test lint bench soak fuzz install uninstall clean race layer cross needs-go needs-test needs-lint

build: needs-go ## build both commands, static, into bin/ (the default)
	$(STATIC) -o bin/ $(PACKAGES)

help: ## print this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## show it at work in network namespaces; touches nothing of this host
	@go run ./internal/demo

# -v, for the log, is what tells of skipped tests; the screen gets the rest.
test: needs-test layer cross build race ## run all tests, as root: at most 15 minutes on two cores
	@for c in $(COMMANDS); do echo "bin/$$c: $$(bin/$$c --version)"; done
	@mkdir -p .cache
	timeout --foreground --kill-after=10s 11m go test -race -count=1 -timeout 10m -v ./... 2>&1 \
		| tee .cache/test.log | sed -u -E '/^(=== |PASS$$| *--- PASS)/d'
	@if grep -E '^ *--- SKIP' .cache/test.log; then \
		echo "the tests above were skipped"; \
		if [ "$${CI:-}" = true ]; then echo "and CI=true makes that a failure" >&2; exit 1; fi; \
	fi

lint: needs-lint ## check format, suspicious code, go.mod and shell scripts
	@files=$$(gofmt -l cmd internal sql); [ -z "$$files" ] || { echo "gofmt -w" $$files >&2; exit 1; }
	go vet ./...
	go run $(STATICCHECK) ./...
	go mod tidy -diff
	find . \( -name .git -o -name .cache -o -path ./bin \) -prune -o -type f -print0 \
		| xargs -0 awk 'FNR == 1 && /^#!.*sh$$|^# shellcheck shell=/ { print FILENAME } { nextfile }' \
		| xargs -r shellcheck

bench: build ## measure
	go test -run '^$$' -bench . -benchmem ./...

soak: needs-test layer build race ## run the tests that take long, at full size, as root
	SOAK=full go test -race -count=1 -timeout 0 -run Soak -v ./...

fuzz: needs-go ## run each fuzz target for FUZZTIME (1m)
	@grep -r --include='*_test.go' -o '^func Fuzz[A-Za-z0-9_]*' cmd internal | while IFS=: read -r file func; do \
		name=$${func#func }; echo "$$file: $$name"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "./$${file%/*}" </dev/null; \
	done

install: ## install what make build made, below DESTDIR: PREFIX (/usr/local), SYSCONFDIR (/etc)
	@for c in $(COMMANDS); do [ -x bin/$$c ] || { echo "there is no bin/$$c yet: run make build first" >&2; exit 1; }; done
	install -d $(DESTDIR)$(PREFIX)/sbin $(DESTDIR)$(SYSCONFDIR)/table-allocator
	install -m 755 $(COMMANDS:%=bin/%) $(DESTDIR)$(PREFIX)/sbin

uninstall: ## remove what make install installed, but no configuration of yours
	rm -f $(COMMANDS:%=$(DESTDIR)$(PREFIX)/sbin/%)
	rmdir --ignore-fail-on-non-empty $(DESTDIR)$(SYSCONFDIR)/table-allocator

clean: ## remove what was built, and the cached packages of the tests
	rm -rf bin .cache

race: needs-test # the commands with the race detector, for the tests
	CGO_ENABLED=1 go build -buildvcs=false -race -ldflags "$(LDFLAGS)" -o bin/race/ $(PACKAGES)

layer: needs-go # the packages that the tests run, in an overlay; once
	@if [ "$$(id -u)" = 0 ]; then go run ./internal/nettest/layer; \
	else echo "not root: most tests will be skipped (try sudo make test)"; fi

cross: needs-go # do they build for other machines?
	for arch in amd64 arm64 arm; do CGO_ENABLED=0 GOOS=linux GOARCH=$$arch $(GOBUILD) -o /dev/null $(PACKAGES); done

needs-go: # go.mod's version
	@want=$$(sed -n 's/^go //p' go.mod); have=$$(go env GOVERSION 2>/dev/null || true); have=$${have%% *}; have=$${have#go}; \
	if [ "$$(printf '%s\n' "$$want" "$$have" | sort -V | head -n 1)" != "$$want" ]; then \
		echo "this needs Go $$want or newer, and found $${have:-none}: https://go.dev/dl/ has it" >&2; exit 1; \
	fi

# $(call need,COMMAND:PACKAGE ...) names the Debian packages of the commands that are missing.
need = missing=; for n in $(1); do command -v "$${n%%:*}" >/dev/null || missing+=" $${n\#*:}"; done; \
	[ -z "$$missing" ] || { echo "this needs more programs: sudo apt-get install$$missing" >&2; exit 1; }

needs-test: needs-go
	@$(call need,git:git ip:iproute2 $$(go env CC):gcc)
	@echo '#include <stdlib.h>' | $$(go env CC) -E - >/dev/null 2>&1 || { \
		echo "this needs the C library's headers: sudo apt-get install libc6-dev" >&2; exit 1; }

needs-lint: needs-go
	@$(call need,shellcheck:shellcheck)

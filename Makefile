# What there is to do: make help.

PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc
FUZZTIME   ?= 1m

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
# packaging/find-go links a Go into .cache/go if the first one in PATH is too old. sudo may not have
# /usr/local/go/bin in PATH, where Go's own archive installs it.
export PATH := $(CURDIR)/.cache/go:$(PATH):/usr/local/go/bin
export GOTOOLCHAIN := auto

MODULE      := github.com/table-allocator/table-allocator
COMMANDS    := table-allocator-server table-allocator-client
PACKAGES    := $(COMMANDS:%=./cmd/%) ./cmd/table-allocator-enter
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GOBUILD     := go build -trimpath -buildvcs=false
LDFLAGS      = -X $(MODULE)/internal/cli.version=$(VERSION)
STATIC       = CGO_ENABLED=0 $(GOBUILD) -ldflags "-s -w $(LDFLAGS)"
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The end-to-end tests run these commands instead of building their own.
export TABLE_ALLOCATOR_BIN        := $(CURDIR)/bin/race
export TABLE_ALLOCATOR_STATIC_BIN := $(CURDIR)/bin

.PHONY: build help demo test integration lint bench soak fuzz install uninstall clean race layer cross needs-go needs-test needs-lint

build: needs-go ## build the commands, static, into bin/ (the default)
	$(STATIC) -o bin/ $(PACKAGES)

help: ## print this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## show it at work in network namespaces; touches nothing of this host
	@go run ./internal/demo

# -v, for the log, is what tells of skipped tests; the screen gets the rest. Tests mostly wait, so
# eight at once need no more than two processors.
MINUTES = 15
test: needs-test layer cross build race ## run all tests, as root: at most 15 minutes on two cores (MINUTES=15)
	@for c in $(COMMANDS); do version=$$(bin/$$c --version); echo "bin/$$c: $$version"; done
	@mkdir -p .cache
	n=$$(nproc); timeout --foreground --kill-after=10s $(MINUTES)m \
		go test -race -count=1 -parallel $$((n > 8 ? n : 8)) -timeout $$(($(MINUTES) - 1))m -v ./... 2>&1 \
		| tee .cache/test.log | sed -u -E '/^(=== |PASS$$| *--- PASS)/d' || { .ci/failed <.cache/test.log; exit 1; }
	@if grep -E '^ *--- SKIP' .cache/test.log; then \
		echo "the tests above were skipped"; \
		if [ "$${CI:-}" = true ]; then echo "and CI=true makes that a failure" >&2; exit 1; fi; \
	fi

# Packages whose tests need no kernel to themselves.
PURE := ./internal/wire ./internal/uplink ./internal/choice ./internal/allocator ./internal/hook ./internal/events

integration: needs-test layer build ## run the tests that need much, as root: packages on machines that boot
	CGO_ENABLED=0 GOARCH=386 go test -count=1 $(PURE) # integers of 32 bits; the kernel runs these programs, too
	@mkdir -p .cache
	go test -tags integration -count=1 -timeout 45m -p 1 -v ./internal/integration/... 2>&1 | tee .cache/integration.log || { .ci/failed <.cache/integration.log; exit 1; }

lint: needs-lint ## check format, suspicious code, go.mod and shell scripts
	@files=$$(gofmt -l cmd internal sql); [ -z "$$files" ] || { echo "gofmt -w" $$files >&2; exit 1; }
	go vet -tags integration ./...
	go run $(STATICCHECK) -tags integration ./...
	go mod tidy -diff
	find . \( -name .git -o -name .cache -o -path ./bin \) -prune -o -type f -print0 \
		| xargs -0 awk 'FNR == 1 && /^#!.*sh$$|^# shellcheck shell=/ { print FILENAME } { nextfile }' \
		| xargs -r shellcheck

bench: build ## measure server and client, the C original beside them with ORIGINAL=DIR, and check every answer
	@go run ./internal/bench $(if $(ORIGINAL),-original "$(ORIGINAL)") $(BENCHFLAGS)
	@go test -run '^$$' -bench 'Connect|Run' ./internal/cgroup # as root: what being bound costs

soak: needs-test layer build race ## run the tests that take long, at full size, as root
	SOAK=full go test -race -count=1 -timeout 0 -run 'Soak|Model' -v ./...
	SOAK=full go test -tags integration -count=1 -timeout 0 -p 1 -v ./internal/integration/...

# By default a minute goes into making each new input shorter.
fuzz: needs-go ## run each fuzz target for FUZZTIME (1m, or 10000000x), and compare the walk with the kernel, as root
	WALK_SETS=5000 WALK_SEED=$$RANDOM go test -count=1 -v -run '^TestKernel$$' ./internal/walk
	@grep -r --include='*_test.go' -o '^func Fuzz[A-Za-z0-9_]*' cmd internal | while IFS=: read -r file func; do \
		name=$${func#func }; echo "$$file: $$name"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x "./$${file%/*}" </dev/null; \
	done

# MODE:SOURCE:DESTINATION of all that is no command, where Debian looks for it. Sources have @SBINDIR@,
# @LIBDIR@ and @SYSCONFDIR@ filled in; configuration of yours is left as it is.
BIN      ?= bin
SBINDIR  := $(PREFIX)/sbin
LIBDIR   := $(PREFIX)/lib/table-allocator
# dhcpcd has no other directory. Those of NetworkManager and firewalld are in /usr/lib for packages.
DHCPCDHOOKS ?= /usr/lib/dhcpcd/dhcpcd-hooks
NMHOOKS     ?= $(SYSCONFDIR)/NetworkManager/dispatcher.d
ZONES       ?= $(SYSCONFDIR)/firewalld/zones
# The fish of a distribution looks below /usr/local only where XDG_DATA_DIRS is set.
FISHDIR     ?= $(if $(filter /usr,$(PREFIX)),/usr/share/fish/vendor_completions.d,$(SYSCONFDIR)/fish/completions)
INSTALLED := \
	644:hooks/hook.sh:$(LIBDIR)/hook.sh \
	755:hooks/udev/udev-remove:$(LIBDIR)/udev-remove \
	644:hooks/udev/90-table-allocator.rules:$(PREFIX)/lib/udev/rules.d/90-table-allocator.rules \
	644:hooks/dhclient/table-allocator:$(SYSCONFDIR)/dhcp/dhclient-enter-hooks.d/table-allocator \
	644:hooks/dhcpcd/60-table-allocator:$(DHCPCDHOOKS)/60-table-allocator \
	755:hooks/udhcpc/table-allocator:$(LIBDIR)/udhcpc \
	755:hooks/pppd/table-allocator:$(SYSCONFDIR)/ppp/ip-up.d/table-allocator \
	755:hooks/ifupdown/table-allocator:$(SYSCONFDIR)/network/if-up.d/table-allocator \
	755:hooks/ifupdown/table-allocator:$(SYSCONFDIR)/network/if-post-down.d/table-allocator \
	755:hooks/NetworkManager/table-allocator:$(NMHOOKS)/table-allocator \
	644:hooks/dnsmasq/table-allocator.conf:$(PREFIX)/share/doc/table-allocator/examples/dnsmasq.conf \
	644:packaging/systemd/table-allocator-server.service.in:$(PREFIX)/lib/systemd/system/table-allocator-server.service \
	644:packaging/systemd/table-allocator-server.socket:$(PREFIX)/lib/systemd/system/table-allocator-server.socket \
	644:packaging/systemd/table-allocator-watch.service.in:$(PREFIX)/lib/systemd/system/table-allocator-watch.service \
	644:packaging/systemd/table-allocator-netns.service.in:$(PREFIX)/lib/systemd/system/table-allocator-netns.service \
	644:packaging/systemd/table-allocator-netns.socket:$(PREFIX)/lib/systemd/system/table-allocator-netns.socket \
	644:packaging/systemd/table-allocator-metrics.service.in:$(PREFIX)/lib/systemd/system/table-allocator-metrics.service \
	644:packaging/systemd/table-allocator-metrics.timer:$(PREFIX)/lib/systemd/system/table-allocator-metrics.timer \
	644:packaging/systemd/networkd.conf:$(PREFIX)/lib/systemd/networkd.conf.d/table-allocator.conf \
	644:packaging/firewalld/table-allocator.xml:$(ZONES)/table-allocator.xml \
	644:packaging/sysctl.conf:$(PREFIX)/lib/sysctl.d/60-table-allocator.conf \
	644:packaging/sysusers.conf:$(PREFIX)/lib/sysusers.d/table-allocator.conf \
	644:packaging/rt_protos.conf:$(SYSCONFDIR)/iproute2/rt_protos.d/table-allocator.conf \
	644:packaging/man/table-allocator-server.8:$(PREFIX)/share/man/man8/table-allocator-server.8 \
	644:packaging/man/table-allocator-client.8:$(PREFIX)/share/man/man8/table-allocator-client.8 \
	644:packaging/man/table-allocator-watch.8:$(PREFIX)/share/man/man8/table-allocator-watch.8 \
	644:packaging/man/table-allocator-status.8:$(PREFIX)/share/man/man8/table-allocator-status.8 \
	644:packaging/man/table-allocator.conf.5:$(PREFIX)/share/man/man5/table-allocator.conf.5 \
	644:packaging/man/table-allocator-run.8:$(PREFIX)/share/man/man8/table-allocator-run.8 \
	644:packaging/man/table-allocator-netns.8:$(PREFIX)/share/man/man8/table-allocator-netns.8 \
	644:packaging/man/table-allocator-enter.8:$(PREFIX)/share/man/man8/table-allocator-enter.8 \
	644:packaging/man/table-allocator-explain.8:$(PREFIX)/share/man/man8/table-allocator-explain.8 \
	644:packaging/completion/bash:$(PREFIX)/share/bash-completion/completions/tactl \
	644:packaging/completion/fish:$(FISHDIR)/tactl.fish \
	644:packaging/completion/bash:$(PREFIX)/share/bash-completion/completions/table-allocator-client \
	644:packaging/completion/bash:$(PREFIX)/share/bash-completion/completions/table-allocator-server \
	644:packaging/completion/zsh:$(PREFIX)/share/zsh/site-functions/_table-allocator \
	644:packaging/completion/fish:$(FISHDIR)/table-allocator-client.fish \
	644:packaging/completion/fish:$(FISHDIR)/table-allocator-server.fish
CONFIGURATION := \
	644:packaging/server.json:$(SYSCONFDIR)/table-allocator/server.json \
	644:packaging/watch.json:$(SYSCONFDIR)/table-allocator/watch.json \
	644:packaging/netns.json:$(SYSCONFDIR)/table-allocator/netns.json \
	644:packaging/default:$(SYSCONFDIR)/default/table-allocator
# Names of tables, which the server writes if it is to.
NAMES = $(SYSCONFDIR)/iproute2/rt_tables.d/table-allocator.conf
FILL = sed -e 's|@SBINDIR@|$(SBINDIR)|g' -e 's|@LIBDIR@|$(LIBDIR)|g' -e 's|@SYSCONFDIR@|$(SYSCONFDIR)|g'

# Folders whose names are filled in into many places. $(call whole,NAME ...) ends make if one of them has a space.
whole = $(foreach v,$(1),$(if $(word 2,$($v)),$(error $v has a space, which is possible in DESTDIR alone: $($v))))
PLACES = PREFIX SYSCONFDIR DHCPCDHOOKS NMHOOKS ZONES FISHDIR BIN

install: ## install what make build made, and the hooks, below DESTDIR: PREFIX (/usr/local), SYSCONFDIR (/etc)
	@$(call whole,$(PLACES))for c in $(COMMANDS); do [ -x $(BIN)/$$c ] || { echo "there is no $(BIN)/$$c yet: run make build first" >&2; exit 1; }; done
	install -D -m 755 -t "$(DESTDIR)$(SBINDIR)" $(COMMANDS:%=$(BIN)/%) $(BIN)/table-allocator-enter
	@if [ -z "$(DESTDIR)" ] && [ "$$(id -u)" = 0 ] && getent group table-allocator >/dev/null; then \
		chown root:table-allocator $(SBINDIR)/table-allocator-enter; chmod 750 $(SBINDIR)/table-allocator-enter; \
		setcap cap_sys_admin,cap_sys_chroot=ep $(SBINDIR)/table-allocator-enter || echo "only root can enter namespaces" >&2; \
	fi
	for c in $(COMMANDS); do ln -sf $$c "$(DESTDIR)$(SBINDIR)/$${c//-/_}"; done # their names in the original
	install -d "$(DESTDIR)$(PREFIX)/share/man/man8"
	ln -sf table-allocator-client "$(DESTDIR)$(SBINDIR)/tactl"
	ln -sf table-allocator-client.8 "$(DESTDIR)$(PREFIX)/share/man/man8/tactl.8"
	install -d "$(DESTDIR)$(SYSCONFDIR)/iproute2/rt_tables.d"
	ln -sf /run/table-allocator/rt_tables.conf "$(DESTDIR)$(NAMES)"
	@set -f; for f in $(INSTALLED) $(CONFIGURATION); do \
		IFS=: read -r mode source destination <<<"$$f"; \
		if [[ " $(CONFIGURATION) " == *" $$f "* && -e "$(DESTDIR)$$destination" ]]; then continue; fi; \
		if [[ $$destination == $(DHCPCDHOOKS)/* ]] && ! { mkdir -p "$(DESTDIR)$(DHCPCDHOOKS)" && [ -w "$(DESTDIR)$(DHCPCDHOOKS)" ]; }; then \
			echo "dhcpcd gets no hook: name a directory that can be written and where it looks, DHCPCDHOOKS=DIR" >&2; continue; \
		fi; \
		echo "install $(DESTDIR)$$destination"; \
		$(FILL) $$source | install -D -m $$mode /dev/stdin "$(DESTDIR)$$destination"; \
	done

# What removing a package does. systemctl disables units that are here, and none of a package.
DISABLE = if [ -d /run/systemd/system ] && [ -e $(PREFIX)/lib/systemd/system/table-allocator-server.service ]; then systemctl --quiet disable --now $(1) || :; fi

uninstall: ## stop what make install installed, release all leases, and remove all but configuration of yours
	@$(call whole,$(PLACES))if [ -z "$(DESTDIR)" ] && [ "$$(id -u)" = 0 ] && [ -x $(SBINDIR)/table-allocator-client ]; then \
		$(call DISABLE,$(addprefix table-allocator-,metrics.timer watch.service netns.socket netns.service)); \
		rm -f /var/lib/prometheus/node-exporter/table-allocator.prom; \
		$(SBINDIR)/table-allocator-client netns del --all || :; \
		$(SBINDIR)/table-allocator-client release --all || { echo "nothing is removed" >&2; exit 1; }; \
		$(call DISABLE,$(addprefix table-allocator-,server.socket server.service)); \
		if [ -n "$$(ls -d /sys/class/net/tav[0-9]* /run/table-allocator/netns/*/.mnt/* 2>/dev/null)" ]; then rm -rf /run/table-allocator/[!n]*; else rm -rf /run/table-allocator; fi; \
	fi
	for c in $(COMMANDS); do rm -f "$(DESTDIR)$(SBINDIR)"/{$$c,$${c//-/_}}; done
	rm -f "$(DESTDIR)$(SBINDIR)"/{table-allocator-enter,tactl} "$(DESTDIR)$(PREFIX)/share/man/man8/tactl.8" "$(DESTDIR)$(NAMES)"
	@for f in $(INSTALLED); do echo "rm -f $(DESTDIR)$${f##*:}"; rm -f "$(DESTDIR)$${f##*:}"; done
	@for f in $(CONFIGURATION); do \
		IFS=: read -r mode source destination <<<"$$f"; \
		if $(FILL) $$source | cmp -s - "$(DESTDIR)$$destination"; then rm "$(DESTDIR)$$destination"; fi; \
	done
	for d in $(LIBDIR) $(PREFIX)/share/doc/table-allocator/examples $(PREFIX)/share/doc/table-allocator $(SYSCONFDIR)/table-allocator; do \
		if [ -d "$(DESTDIR)$$d" ]; then rmdir --ignore-fail-on-non-empty "$(DESTDIR)$$d"; fi; \
	done
	if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi

include packaging/package/build.mk

clean: ## remove what was built, and the cached packages of the tests
	rm -rf bin .cache

race: needs-test # the commands with the race detector, for the tests
	CGO_ENABLED=1 go build -buildvcs=false -race -ldflags "$(LDFLAGS)" -o bin/race/ $(PACKAGES)

layer: needs-go # the packages that the tests run, in an overlay; once
	@if [ "$$(id -u)" = 0 ]; then go run ./internal/nettest/layer; \
	else echo "not root: most tests will be skipped (try sudo make test)"; fi

cross: needs-go # do they build for other machines?
	for arch in amd64 arm64 arm; do CGO_ENABLED=0 GOOS=linux GOARCH=$$arch $(GOBUILD) -o /dev/null $(PACKAGES); done

needs-go: # go.mod's version, or one that downloads it
	@packaging/find-go

# $(call need,COMMAND:PACKAGE ...) names the Debian packages of the commands that are missing.
need = missing=; for n in $(1); do command -v "$${n%%:*}" >/dev/null || missing+=" $${n\#*:}"; done; \
	[ -z "$$missing" ] || { echo "this needs more programs: sudo apt-get install$$missing" >&2; exit 1; }

needs-test: needs-go
	@$(call need,git:git ip:iproute2 $$(go env CC):gcc)
	@echo '#include <stdlib.h>' | $$(go env CC) -E - >/dev/null 2>&1 || { \
		echo "this needs the C library's headers: sudo apt-get install libc6-dev" >&2; exit 1; }

needs-lint: needs-go
	@$(call need,shellcheck:shellcheck)

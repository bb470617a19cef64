# Packages: make deb rpm. Both are made of what make install installs below PREFIX=/usr, and are the same
# bit for bit wherever they are built.

PACKAGE_ARCHES  ?= amd64 arm64 armhf
# A tag v1.2.3 is version 1.2.3, and five commits later 1.2.3+5.gCOMMIT. Without a tag the version sorts
# before the first one, 0.1.0.
PACKAGE_VERSION ?= $(shell git describe --tags --match 'v[0-9]*' 2>/dev/null | sed -E 's/^v//; s/-([0-9]+)-g/+\1.g/' | grep . \
	|| TZ=UTC git log -1 --format=0.1.0~git%cd.%h --abbrev=7 --date=format-local:%Y%m%d%H%M 2>/dev/null)
# How hard the packages are pressed.
DEB_LEVEL       ?= -z7
RPM_PAYLOAD     ?= w9.xzdio
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)

GO_ARCH_amd64  := GOARCH=amd64
GO_ARCH_arm64  := GOARCH=arm64
GO_ARCH_armhf  := GOARCH=arm GOARM=7
RPM_ARCH_amd64 := x86_64
RPM_ARCH_arm64 := aarch64
RPM_ARCH_armhf := armv7hl

PACKAGING = $(CURDIR)/packaging/package
STAGE     = $(CURDIR)/.cache/package/$*

.PHONY: deb rpm
deb: $(PACKAGE_ARCHES:%=deb-%) ## packages for Debian and Ubuntu, in bin/
rpm: $(PACKAGE_ARCHES:%=rpm-%) ## packages for Fedora and the like, in bin/; needs rpmbuild

# The page of a command has the original's name, too. Hooks that are no configuration are in /usr/lib.
stage-%: VERSION = $(PACKAGE_VERSION)
stage-%: needs-go
	@[ -n "$(PACKAGE_VERSION)" ] || { echo "no git says which version this is: PACKAGE_VERSION=1.2.3" >&2; exit 1; }
	$(call whole,CURDIR)rm -rf $(STAGE)
	$(GO_ARCH_$*) $(STATIC) -o $(STAGE)/bin/ $(PACKAGES)
	$(MAKE) -s install BIN=$(STAGE)/bin PREFIX=/usr DESTDIR=$(STAGE)/root NMHOOKS=/usr/lib/NetworkManager/dispatcher.d ZONES=/usr/lib/firewalld/zones >/dev/null
	cd $(STAGE)/root/usr/share/man/man8; for c in server client; do ln -s table-allocator-$$c.8.gz table_allocator_$$c.8.gz; done; rm tactl.8; ln -s table-allocator-client.8.gz tactl.8.gz; gzip -9n *.8 ../man5/*.5
	$(PACKAGING)/copyright | install -D -m 644 /dev/stdin $(STAGE)/root/usr/share/doc/table-allocator/copyright
	printf 'table-allocator (%s) unstable; urgency=medium\n\n  * See https://github.com/table-allocator/table-allocator/commits\n\n -- the table-allocator authors <table-allocator@example.net>  %s\n' \
		'$(PACKAGE_VERSION)' "$$(TZ=UTC LC_ALL=C date -d @$(SOURCE_DATE_EPOCH) '+%a, %d %b %Y %T %z')" \
		| gzip -9n | install -D -m 644 /dev/stdin $(STAGE)/root/usr/share/doc/table-allocator/changelog.gz
	find $(STAGE)/root -exec touch -h -d @$(SOURCE_DATE_EPOCH) {} +

deb-%: stage-%
	cp -a $(STAGE)/root $(STAGE)/deb
	mv $(STAGE)/deb/usr/share/zsh/site-functions $(STAGE)/deb/usr/share/zsh/vendor-completions # where Debian's zsh looks
	install -D -m 644 $(PACKAGING)/lintian-overrides $(STAGE)/deb/usr/share/lintian/overrides/table-allocator
	$(PACKAGING)/copyright debian >$(STAGE)/deb/usr/share/doc/table-allocator/copyright
	cd $(STAGE)/deb; mkdir DEBIAN; \
	sed -e 's/@VERSION@/$(PACKAGE_VERSION)/' -e 's/@ARCH@/$*/' \
		-e "s/@SIZE@/$$(du -sk --apparent-size usr etc | awk '{n += $$1} END {print n}')/" $(PACKAGING)/control >DEBIAN/control; \
	for s in postinst prerm postrm; do install -m 755 $(PACKAGING)/deb-$$s DEBIAN/$$s; done; \
	find etc -type f -printf '/%p\n' | LC_ALL=C sort >DEBIAN/conffiles; \
	find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum >DEBIAN/md5sums; \
	find . -exec touch -h -d @$(SOURCE_DATE_EPOCH) {} +
	mkdir -p bin
	dpkg-deb --root-owner-group -Zxz $(DEB_LEVEL) -b $(STAGE)/deb bin/table-allocator_$(PACKAGE_VERSION)_$*.deb

rpm-%: stage-%
	@command -v rpmbuild >/dev/null || { echo "this needs rpmbuild: sudo apt-get install rpm" >&2; exit 1; }
	rpmbuild -bb --quiet --target $(RPM_ARCH_$*)-linux -D '_topdir $(STAGE)/rpm' -D '_rpmdir $(CURDIR)/bin' \
		-D '_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm' -D 'v $(PACKAGE_VERSION)' -D 'stage $(STAGE)/root' \
		-D "day $$(TZ=UTC LC_ALL=C date -d @$(SOURCE_DATE_EPOCH) '+%a %b %d %Y')" -D 'scripts $(PACKAGING)' -D '_buildhost localhost' -D 'use_source_date_epoch_as_buildtime 1' \
		-D 'clamp_mtime_to_source_date_epoch 1' -D '_binary_payload $(RPM_PAYLOAD)' $(PACKAGING)/table-allocator.spec

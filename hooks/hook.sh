# shellcheck shell=sh
#
# Reads the settings of the hooks and hands them to the client, by name. The hooks of dhclient,
# ifupdown, NetworkManager and udev run this, with the name of the program and their arguments,
# as a process of its own and under a limit of time, so that nothing in the settings fails
# them, stops them or reaches whoever runs them.

export PATH=@SBINDIR@:/usr/sbin:/usr/bin:/sbin:/bin # udev gives none
export ROUTES=move DNSMASQ_SERVERS=/run/table-allocator/dnsmasq.servers LEAVE_ALONE='' CLIENT_OPTIONS=''

# How the client is run. The limit is that of the hooks; settings may have a command of their own
# of this name.
timeout() {
	shift
	exec "$@"
}

settings() { # in a function, since they may set arguments
	# shellcheck source=packaging/default
	. @SYSCONFDIR@/default/table-allocator
}
if [ -r @SYSCONFDIR@/default/table-allocator ]; then
	settings
fi

# What is left when the package was removed and its configuration was not.
command -v table-allocator-client >/dev/null || exit 0
timeout 10 table-allocator-client hook "$@"

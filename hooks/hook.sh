# shellcheck shell=sh
#
# Sources the settings of the hooks and passes them to the client as variables. The hooks of
# dhclient, dhcpcd, pppd, ifupdown, NetworkManager and udev run this script as a process of its own with a time
# limit, so that no line of the settings can end, stop or change the program that runs the hook.
# Its arguments are the name of that program, and those of the hook.

export PATH=@SBINDIR@:/usr/sbin:/usr/bin:/sbin:/bin # udev gives none
export ROUTES=move RESOLVER=dnsmasq DNSMASQ_SERVERS=/run/table-allocator/dnsmasq.servers LEAVE_ALONE='' CLIENT_OPTIONS=''

# The client runs in place of this script, under the time limit of the hook. Settings may replace
# this function.
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

# The client is missing if the package was removed and its configuration was not.
command -v table-allocator-client >/dev/null || exit 0
timeout 10 table-allocator-client hook "$@"

# shellcheck shell=sh
#
# What the hooks of table-allocator share. Each sources it in a subshell of its own, so
# that nothing of it reaches the program which runs the hook, and carries on whatever
# comes of it: a link has to come up without table-allocator, too.

set +eu # the hook may be sourced by a script that wants them
set -f  # values are split into words, never expanded to file names
export PATH=@SBINDIR@:/usr/sbin:/usr/bin:/sbin:/bin # udev gives none

ROUTES=move
DNSMASQ_SERVERS=/run/table-allocator/dnsmasq.servers
LEAVE_ALONE=
CLIENT_OPTIONS=
if [ -r @SYSCONFDIR@/default/table-allocator ]; then
	# shellcheck source=packaging/default
	. @SYSCONFDIR@/default/table-allocator
fi

# What is left when the package was removed and its configuration was not.
command -v table-allocator-client >/dev/null || exit 0

# ours IFNAME: the hooks care for this link.
ours() {
	for pattern in lo $LEAVE_ALONE; do
		# shellcheck disable=SC2254 # it is a pattern
		case $1 in $pattern) return 1 ;; esac
	done
	[ -n "$1" ]
}

# hold ADDRESS IFNAME OPTION...: lease a table for an IPv4 address, or tell its holder
# what has changed. The table is the holder's business. It is there within milliseconds, or
# a second without a server; the limit is for what nobody has thought of.
hold() {
	address=$1 ifname=$2
	shift 2
	# The administrator's options come last: they win.
	# shellcheck disable=SC2086 # they are words
	timeout 10 table-allocator-client -4 -a "$address" -i "$ifname" --routes "$ROUTES" \
		"$@" $CLIENT_OPTIONS </dev/null >/dev/null
}

# release ADDRESS IFNAME: give back what hold got, also for a holder that was killed.
release() {
	timeout 10 table-allocator-client -4 -r -a "$1" -i "$2" </dev/null >/dev/null
}

# The functions below write the options of hold, one word each: addresses have no blanks.

# gateways METRIC ADDRESS...: METRIC may be empty.
gateways() {
	case $1 in '' | *[!0-9]*) ;; *) printf ' --metric %s' "$1" ;; esac
	shift
	for gateway; do
		# 0.0.0.0 is how some servers and NetworkManager spell "none".
		case $gateway in 0.0.0.0 | *[!0-9.]*) ;; *) printf ' --gateway %s' "$gateway" ;; esac
	done
}

# nameservers ADDRESS...
nameservers() {
	[ -n "$DNSMASQ_SERVERS" ] && [ $# -gt 0 ] || return 0
	printf ' --dnsmasq-servers %s' "$DNSMASQ_SERVERS"
	for server; do
		case $server in 0.0.0.0 | *[!0-9.]*) ;; *) printf ' --nameserver %s' "$server" ;; esac
	done
}

# get VARIABLE NAME: set the variable to what the environment calls ${prefix}_NAME.
get() {
	eval "$1=\${${prefix}_$2-}"
}

# numbered NAME COUNT: the values of ${prefix}_NAME_0 and so on, of which ${prefix}_COUNT
# tells the number, with commas for blanks.
numbered() {
	get number "$2"
	n=0
	while [ "$n" -lt "${number:-0}" ]; do
		get value "${1}_$n"
		printf '%s\n' "$value" | tr ' ' ,
		n=$((n + 1))
	done
}

# networkmanager IFNAME ACTION: an event of NetworkManager, which is in the environment of
# dispatcher scripts and of the scripts of ifupdown that one of those runs. Routes are
# copied: NetworkManager keeps main as it wants it, and of what a renewal changes there it
# tells nobody. The holder sees that in the kernel, so gateways known from here stand back
# behind those in main, whose metric is below 30000.
networkmanager() {
	ROUTES=copy gateway='' nameservers='' number='' value=''
	case $2 in
	up | dhcp4-change | reapply) ifname=${DEVICE_IP_IFACE:-$1} prefix=IP4 ;; # a modem's $1 is its serial port
	vpn-up) ifname=${VPN_IP_IFACE:-$1} prefix=VPN_IP4 ;;
	*) return 0 ;; # among them down: the holders see their addresses go
	esac
	ours "$ifname" || return 0
	get gateway GATEWAY
	get nameservers NAMESERVERS
	# With never-default main has no gateway, and the address may have one all the same.
	case $prefix$gateway${DHCP4_RFC3442_CLASSLESS_STATIC_ROUTES-} in
	IP4 | IP40.0.0.0) gateway=${DHCP4_ROUTERS-} ;;
	esac
	# shellcheck disable=SC2086 # lists are words
	options="$(gateways 30000 $gateway)$(nameservers $nameservers)"
	if [ "$2" = reapply ]; then
		# The event tells of the addresses and routes before it. The kernel has the new ones.
		addresses=$(ip -4 -oneline address show dev "$ifname" scope global | sed -n 's/.* inet \([0-9.]*\).*\/\([0-9]*\) .*/\1\/\2/p')
	else
		addresses=$(numbered ADDRESS NUM_ADDRESSES) # ADDRESS/LENGTH,GATEWAY
		for route in $(numbered ROUTE NUM_ROUTES); do # NETWORK/LENGTH,GATEWAY,METRIC
			route=${route%,*}
			options="$options --route ${route%,0.0.0.0}"
		done
	fi
	for address in $addresses; do
		address=${address%%,*}
		# shellcheck disable=SC2086 # options are words
		hold "${address%/*}" "$ifname" -n "${address#*/}" -t NetworkManager $options
	done
}

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

# family ADDRESS: 4 or 6.
family() {
	case $1 in *:*) echo 6 ;; *) echo 4 ;; esac
}

# hold ADDRESS IFNAME OPTION...: lease a table for an address, or tell its holder what has
# changed. The table is the holder's business. It is there within milliseconds, or a second
# without a server; the limit is for what nobody has thought of.
hold() {
	address=$1 ifname=$2
	shift 2
	if [ "$ROUTES" = none ]; then # who places routes knows them
		words=$#
		while [ "$words" -gt 0 ]; do
			case $1 in
			--gateway | --metric | --route | --classless-routes)
				shift
				words=$((words - 1))
				;;
			*) set -- "$@" "$1" ;;
			esac
			shift
			words=$((words - 1))
		done
	fi
	# The administrator's options come last: they win.
	# shellcheck disable=SC2086 # they are words
	timeout 10 table-allocator-client "-$(family "$address")" -a "$address" -i "$ifname" --routes "$ROUTES" \
		"$@" $CLIENT_OPTIONS </dev/null >/dev/null
}

# release ADDRESS IFNAME: give back what hold got, also for a holder that was killed.
release() {
	timeout 10 table-allocator-client "-$(family "$1")" -r -a "$1" -i "$2" </dev/null >/dev/null
}

# lose ADDRESS IFNAME: somebody is about to take the address from the link. It has to go before
# its rules do, or packets from it would leave by another uplink in between.
lose() {
	ip "-$(family "$1")" address flush dev "$2" to "$1" 2>/dev/null
	release "$1" "$2"
}

# watching IFNAME: the words that make the client a watch for the IPv6 addresses of a link,
# whatever brings them. --clean: it takes back what it has at the end.
watching() {
	printf 'watch -6 --ifname %s --exclude= --routes %s -t ifupdown --clean --syslog %s' "$1" "$ROUTES" "$CLIENT_OPTIONS"
}

# attend IFNAME: start that watch. One that is there already goes on.
attend() {
	# In the background nobody would read that it does not know one of the options.
	# shellcheck disable=SC2046 # they are words
	table-allocator-client $(watching "$1") --help >/dev/null || return
	mkdir -p /run/table-allocator
	# shellcheck disable=SC2046 # they are words
	start-stop-daemon --start --quiet --oknodo --background --make-pidfile --pidfile "/run/table-allocator/watch.$1.pid" \
		--name table-allocator --startas "$(command -v table-allocator-client)" -- $(watching "$1")
}

# leave IFNAME: end it.
leave() {
	pidfile=/run/table-allocator/watch.$1.pid
	[ -e "$pidfile" ] || return 0
	start-stop-daemon --stop --quiet --retry TERM/5/KILL/1 --remove-pidfile --pidfile "$pidfile" --name table-allocator && return
	# It was killed. Another one takes back what it has left, first of all.
	rm -f "$pidfile"
	# shellcheck disable=SC2046 # they are words
	timeout 1 table-allocator-client $(watching "$1")
}

# dynamic IFNAME: the IPv6 addresses that routers and DHCPv6 gave a link, but not those that
# are for a few hours only.
dynamic() {
	ip -6 -oneline address show dev "$1" scope global dynamic -temporary -dadfailed |
		sed -n 's/.* inet6 \([0-9a-f:]*\).*/\1/p'
}

# all_dynamic IFNAME OPTION...: hold each of them. If there is none yet that is done behind the
# caller's back, within the minute: routers may answer later than a server of DHCPv6.
all_dynamic() {
	if [ -z "$(dynamic "$1")" ]; then
		(
			n=0
			while [ -z "$(dynamic "$1")" ] && [ "$n" -lt 60 ]; do
				sleep 1
				n=$((n + 1))
			done
			hold_dynamic "$@"
		) </dev/null >/dev/null 2>&1 &
		return
	fi
	hold_dynamic "$@"
}

hold_dynamic() {
	link=$1
	shift
	for each_address in $(dynamic "$link"); do
		hold "$each_address" "$link" "$@"
	done
}

# A prefix that DHCPv6 delegates through a link concerns all addresses of the link, and each is
# told of by a call of its own: so it is remembered.

# delegate IFNAME PREFIX; undelegate IFNAME.
delegate() {
	mkdir -p /run/table-allocator && printf '%s\n' "$2" >"/run/table-allocator/prefix.$1"
}

undelegate() {
	rm -f "/run/table-allocator/prefix.$1"
}

# The functions below write the options of hold, one word each: addresses have no blanks.

# delegated IFNAME
delegated() {
	[ -r "/run/table-allocator/prefix.$1" ] || return 0
	printf ' --prefix '
	cat "/run/table-allocator/prefix.$1"
}

# each OPTION FAMILY ADDRESS...: the option for each address of the family. 0.0.0.0 is how some
# servers and NetworkManager spell "none".
each() {
	option=$1 family=$2
	shift 2
	for address; do
		case $family${address%%%*} in
		40.0.0.0 | 6:: | 4*[!0-9.]* | 6*[!0-9a-fA-F:.]*) ;;
		4*.* | 6*:*) printf ' --%s %s' "$option" "$address" ;;
		esac
	done
}

# gateways FAMILY METRIC ADDRESS...: METRIC may be empty.
gateways() {
	family=$1
	case $2 in '' | *[!0-9]*) ;; *) printf ' --metric %s' "$2" ;; esac
	shift 2
	each gateway "$family" "$@"
}

# nameservers FAMILY ADDRESS...
nameservers() {
	[ -n "$DNSMASQ_SERVERS" ] && [ $# -gt 1 ] || return 0
	printf ' --dnsmasq-servers %s' "$DNSMASQ_SERVERS"
	each nameserver "$@"
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
	options="$(gateways 4 30000 $gateway)$(nameservers 4 $nameservers)"
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

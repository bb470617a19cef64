package hook

// udev reads the variables of a rule for a link that was removed, an unplugged modem for example. The
// dhclient of the link would wait for ever, and take the next link of that name for its own. Holders end
// by themselves; the calls are for leftovers of holders that were killed.
func (e *event) udev() {
	if e.link(e.get("INTERFACE")) {
		e.call(EndDhclient{Ifname: e.ifname})
		e.call(ReleaseAll{Ifname: e.ifname, Options: e.settings.options})
	}
}

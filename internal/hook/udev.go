package hook

// udev says that a link is gone, a modem unplugged say. Its dhclient would wait for it for ever, and
// take the next link of that name for it. A holder ends by itself when the link goes; what one that
// was killed before has left goes now.
func (e *event) udev() {
	if e.link(e.get("INTERFACE")) {
		e.call(EndDhclient{Ifname: e.ifname})
		e.call(ReleaseAll{Ifname: e.ifname, Options: e.settings.options})
	}
}

package outside

import "testing"

// TestService: a message names the command of what manages the services of the host, or the service where none is known.
func TestService(t *testing.T) {
	for _, tt := range []struct{ manager, verb, want, journal string }{
		{systemd, "start", "systemctl start server", "journalctl -u server"},
		{systemd, "enable --now", "systemctl enable --now server", "journalctl -u server"},
		{openRC, "restart", "rc-service server restart", "the log of server"},
		{openRC, "enable --now", "rc-update add server && rc-service server start", "the log of server"},
		{"", "reload", "reload the service server", "the log of server"},
		{"", "enable --now", "enable and start the service server", "the log of server"},
	} {
		if got := serviceBy(tt.manager, tt.verb, "server"); got != tt.want {
			t.Errorf("%s by %q: got %q, want %q", tt.verb, tt.manager, got, tt.want)
		}
		if got := journalBy(tt.manager, "server"); got != tt.journal {
			t.Errorf("the log by %q: got %q, want %q", tt.manager, got, tt.journal)
		}
	}
}

package cli

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"syscall"
	"time"
)

// syslog is a connection to the syslog daemon of this host. Each write is a message.
type syslog struct {
	path     string
	patience time.Duration // a daemon that has not read for so long may have been replaced
	conn     net.Conn
}

func newSyslog() *syslog { return &syslog{path: "/dev/log", patience: 5 * time.Second} }

func (s *syslog) dial() error {
	var errs []error
	for _, network := range []string{"unixgram", "unix"} {
		conn, err := net.Dial(network, s.path)
		if err == nil {
			s.conn = conn
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// write waits for a daemon that does not read. It connects again to one that was started again.
func (s *syslog) write(line []byte) error {
	for old := s.conn != nil; ; old = false {
		if s.conn == nil {
			if err := s.dial(); err != nil {
				return err
			}
		}
		_ = s.conn.SetWriteDeadline(time.Now().Add(s.patience)) // fails as Write does
		_, err := s.conn.Write(line)
		if err == nil || errors.Is(err, syscall.EMSGSIZE) {
			return err
		}
		s.conn.Close()
		s.conn = nil
		if !old && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
}

// syslogPrefix begins a message of a command: its priority, the time, and who writes.
func syslogPrefix(command string) func(slog.Level) string {
	const daemon = 3 << 3 // the facility
	return func(level slog.Level) string {
		return fmt.Sprintf("<%d>%s %s[%d]: ", daemon|severity(level), time.Now().Format(time.Stamp), command, os.Getpid())
	}
}

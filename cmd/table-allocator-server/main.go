// Command table-allocator-server leases routing table numbers to the processes of this
// host. See its manual page, table-allocator-server(8).
package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/pflag"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/cli/systemd"
	"github.com/table-allocator/table-allocator/internal/server"
)

const usage = `Usage: table-allocator-server [-c FILE]

Leases routing table numbers, unique on this host, to table-allocator-client.
Without -c it serves @tas_socket with tables 10000 to 10039 for an hour each.

  -c, --config FILE  configuration (JSON, // comments allowed); the file of the
                     original table_allocator_server works. SIGHUP reads it
                     again
      --check        say whether the configuration is right, and exit
      --debug        log renewals and replies too
      --version      print the version and exit
  -h, --help         print this and exit

Who has which table:
  sqlite3 /var/lib/table-allocator/leases.db 'select * from leases'
`

func main() {
	cli.NameProcess(os.Args[0], "")
	cli.Exit(run())
}

func run() int {
	flags := pflag.NewFlagSet("table-allocator-server", pflag.ContinueOnError)
	flags.SetOutput(os.Stderr)
	flags.Usage = func() {}
	config := flags.StringP("config", "c", "", "")
	check := flags.Bool("check", false, "")
	debug := flags.Bool("debug", false, "")
	version := flags.Bool("version", false, "")
	switch err := flags.Parse(os.Args[1:]); {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Print(usage)
		return cli.ExitOK
	case err != nil:
		return fail(err)
	case *version:
		fmt.Println(cli.Version())
		return cli.ExitOK
	case flags.NArg() > 0:
		return fail(fmt.Errorf("unexpected argument %q (see --help)", flags.Arg(0)))
	}
	load := func() (server.Config, error) { return server.Default(), nil }
	if flags.Changed("config") {
		load = func() (server.Config, error) { return server.LoadConfig(*config) }
	}
	cfg, err := load()
	if err != nil {
		return fail(err)
	}
	if *check {
		fmt.Println("configuration ok")
		return cli.ExitOK
	}
	log, err := cli.NewLogger(cli.LogConfig{
		Command: "table-allocator-server", Syslog: cfg.Syslog, Path: cfg.LogPath, Debug: *debug,
	})
	if err != nil {
		return fail(err)
	}
	if err := serve(cfg, load, log); err != nil {
		log.Error("cannot serve", "err", err)
		if cfg.Syslog || cfg.LogPath != "" {
			return fail(err) // a user who starts the server by hand looks here
		}
		return cli.ExitError
	}
	return cli.ExitOK
}

func serve(cfg server.Config, load func() (server.Config, error), log *slog.Logger) error {
	ctx, stop := cli.UntilSignal()
	defer stop()
	period, err := systemd.WatchdogInterval()
	if err != nil {
		return fmt.Errorf("read WATCHDOG_USEC: %w", err)
	}
	return server.Run(ctx, cfg, server.Host{
		Sockets:     systemd.PassedFiles(),
		Ready:       systemd.NotifyReady,
		Stopping:    systemd.NotifyStopping,
		Alive:       systemd.NotifyAlive,
		AlivePeriod: period,
		Reload: cli.Reloads(ctx, func() server.Reload {
			cfg, err := load()
			return server.Reload{Config: cfg, Err: err}
		}),
	}, log)
}

func fail(err error) int {
	fmt.Fprintln(cli.Stderr, "table-allocator-server:", err)
	return cli.ExitError
}

package cgroup

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// BenchmarkRun is how long a command takes to its end, as it is and behind run.
func BenchmarkRun(b *testing.B) {
	bin := os.Getenv("TABLE_ALLOCATOR_STATIC_BIN")
	if bin == "" {
		b.Skip("TABLE_ALLOCATOR_STATIC_BIN does not say where the commands are; make bench does")
	}
	client := filepath.Join(bin, "table-allocator-client")
	config := filepath.Join(b.TempDir(), "server.json")
	if err := os.WriteFile(config, []byte(`{"db_path":"`+config+`.db"}`), 0o644); err != nil {
		b.Fatal(err)
	}
	server := exec.Command(filepath.Join(bin, "table-allocator-server"), "-c", config)
	if err := server.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = server.Process.Kill() // it has not ended
		_ = server.Wait()
	})
	for _, args := range []string{
		"ip link add bench0 type veth peer name bench1", "ip link set bench0 up", "ip link set bench1 up",
		"ip address add 192.0.2.9/24 dev bench0", client + " -4 -a 192.0.2.9 -i bench0",
	} {
		f := strings.Fields(args)
		if out, err := exec.Command(f[0], f[1:]...).CombinedOutput(); err != nil {
			b.Fatalf("%s: %v\n%s", args, err, out)
		}
	}
	b.Cleanup(func() {
		_ = exec.Command(client, "-r", "-4", "-a", "192.0.2.9", "-i", "bench0").Run() // the sandbox ends anyway
		_ = exec.Command("ip", "link", "del", "bench0").Run()
	})
	for _, how := range []struct {
		name string
		args []string
	}{{"true", []string{"true"}}, {"run", []string{client, "run", "--ifname", "bench0", "true"}}} {
		b.Run(how.name, func(b *testing.B) {
			for b.Loop() {
				if out, err := exec.Command(how.args[0], how.args[1:]...).CombinedOutput(); err != nil {
					b.Fatalf("%q: %v\n%s", how.args, err, out)
				}
			}
		})
	}
}

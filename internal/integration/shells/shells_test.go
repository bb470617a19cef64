//go:build integration

// Package shells asks the bash, zsh and fish of Debian what they offer behind tactl. It has a root of its own for them.
package shells

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// root has the shells.
var root = nettest.Debian{Suite: "trixie", Set: "shells", Packages: []string{"bash-completion", "fish", "iproute2", "procps", "zsh"}}

func TestMain(m *testing.M) {
	if !nettest.InSandbox() && os.Geteuid() == 0 {
		if err := nettest.MakeDebian(root.Set, root); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	nettest.Main(m)
}

// enterScript runs a shell, $3 and its arguments, in an overlay of the root $1 with what is installed below $2.
const enterScript = `
	sleep 1000 >/dev/null 2>&1 &
	mount -t tmpfs shells /mnt
	mkdir /mnt/upper /mnt/work /mnt/root
	mount -t overlay -o "lowerdir=$1,upperdir=/mnt/upper,workdir=/mnt/work" shells /mnt/root
	cp -a "$2/." /mnt/root
	cd /mnt/root
	mkdir -p .old proc sys dev run tmp
	mount -t proc proc proc; mount -t sysfs -o ro sysfs sys; mount --rbind /dev dev; mount -t tmpfs tmpfs run; mount -t tmpfs tmpfs tmp
	mkdir run/netns; touch run/netns/work
	echo "192.0.2.9 elsewhere" >etc/hosts
	pivot_root . .old; cd /; umount -l /.old; shift 2
	exec env -i HOME=/root TERM=dumb LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"`

// askers are programs of each shell that print, for each argument, a line with what is offered at its end.
//
// What is typed on a terminal of its own is completed by the line editor of bash, which puts all that it offers into the line,
// and of zsh, where each compadd says what it adds.
var askers = map[string][]string{
	"bash": {"zsh", "-f", "-c", onTerminal, "terminal", "bash --norc -i", `PS1=; bind "set bell-style none"; bind "set enable-bracketed-paste off"; . /usr/share/bash-completion/bash_completion
		answer() { case $READLINE_LINE in *" ") ;; *) READLINE_LINE= ;; esac; printf %s "${READLINE_LINE#"$(</tmp/asked)"}" >/tmp/offered; mv /tmp/offered /tmp/answer; READLINE_LINE=; }
		bind "\"\C-xi\": insert-completions"; bind -x "\"\C-xa\": answer"; bind "\"\C-t\": \"\C-xi\C-xa\""; touch /tmp/ready`},
	"zsh": {"zsh", "-f", "-c", onTerminal, "terminal", "zsh -f -i", `PROMPT=; unsetopt beep; autoload -Uz compinit; compinit -D
		compadd() {
			local -a offered
			[[ -n ${argv[(r)-[OAD]]} ]] || { builtin compadd -O offered "$@"; print -rn -- "$offered " >>/tmp/offered }
			builtin compadd "$@"
		}
		ask() { : >/tmp/offered; _main_complete; mv /tmp/offered /tmp/answer }
		zle -C ask complete-word ask; bindkey "^T" ask; touch /tmp/ready`},
	"fish": {"fish", "-c", `for line in $argv; echo (complete -C "$line" | string replace -r '\t.*' ''); end`},
}

// onTerminal starts $1 on a terminal of its own, gives it the lines $2, and types the other arguments. It waits a minute for each answer.
const onTerminal = `
	zmodload zsh/zpty
	print -r -- $2 >/tmp/rc
	zpty shell $1
	zpty -w shell '. /tmp/rc'
	await() {
		integer n; local all=
		for ((n = 0; n < 6000; n++)); do
			[[ ! -e $1 ]] || return 0
			said=; zpty -r -t shell said; all+=$said; sleep 0.01
		done
		print -r -- "no answer to $2: $all" >&2; exit 1
	}
	await /tmp/ready $2
	for line in "${@:3}"; do
		print -rn -- "${line% *} " >/tmp/asked
		zpty -w -n shell "$line"$'\C-t'
		await /tmp/answer $line
		print -r -- $(</tmp/answer); rm /tmp/answer
		zpty -w -n shell $'\C-u'
	done
	zpty -d shell`

// offers asks a shell what it offers at the end of each line.
func offers(t *testing.T, shell string, lines []string) [][]string {
	t.Helper()
	installed := t.TempDir()
	if out, err := exec.Command("make", "-C", "../../..", "install", "DESTDIR="+installed).CombinedOutput(); err != nil {
		t.Fatalf("make install: %v\n%s", err, out)
	}
	dir, err := root.Dir()
	if err != nil {
		t.Fatal(err)
	}
	host := nettest.New(t, "host")
	for _, link := range []string{"wan0", "wan1"} {
		nettest.Veth(t, host, link, nettest.New(t, link), "host")
	}
	host.IP(t, "address add 10.77.0.2/24 dev wan0")
	host.IP(t, "address add 2001:db8::2/64 dev wan1 nodad")
	argv := slices.Concat([]string{"--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", enterScript, "sh", dir, installed}, askers[shell], lines)
	cmd := exec.Command("unshare", argv...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err = host.Start(cmd); err == nil {
		err = cmd.Wait()
	}
	answers := strings.Split(strings.TrimSuffix(stdout.String(), "\n"), "\n")
	if err != nil || len(answers) != len(lines) {
		t.Fatalf("%s: %v, %d answers to %d questions\n%s\n%s", shell, err, len(answers), len(lines), &stdout, &stderr)
	}
	all := make([][]string, len(lines))
	for i, answer := range answers {
		all[i] = strings.Fields(answer)
	}
	return all
}

// question is a line that ends at the cursor.
type question struct {
	line string
	want string // what is offered, but for options
	some bool   // and more
}

const (
	commands  = "watch status history uplinks explain doctor run attach detach bind unbind bound release reexec netns"
	links     = "lo wan0 wan1"
	addresses = "10.77.0.2 2001:db8::2"
	wans      = "wan0 wan1"
	users     = "root daemon"
	pid       = "2" // of a program that enterScript starts
)

var questions = []question{
	{"tactl ", "help version " + commands, false}, {"tactl st", "status", false}, {"tactl un", "unbind", false}, {"tactl xy", "", false},
	{"table-allocator-client stat", "status", false}, {"table_allocator_client stat", "status", false},
	{"tactl help ", commands, false}, {"tactl help hist", "history", false}, {"tactl version ", "", false},
	{"tactl -a ", addresses, false}, {"tactl -a 10", "10.77.0.2", false}, {"tactl -a 10.77.0.2 -i wan", wans, false}, {"tactl -a 10.77.0.2 -i wan0 --routes ", "none move copy", false},
	{"tactl watch ", "", false}, {"tactl watch --on-loss b", "block", false}, {"tactl watch --resolver ", "dnsmasq resolved none", false}, {"tactl watch -i wan", wans, false},
	{"tactl status ", links + " " + addresses, false}, {"tactl status wan", wans, false}, {"tactl status wan0 10", "10.77.0.2", false}, {"tactl status --json wan", wans, false},
	{"tactl history ", links + " " + addresses, false}, {"tactl doctor 2001", "2001:db8::2", false}, {"tactl doctor wan", wans, false},
	{"tactl uplinks ", "use probe " + links, false}, {"tactl uplinks use ", "auto " + links, false}, {"tactl uplinks probe wan", wans, false}, {"tactl uplinks --kind ", "icmp dns tcp:443", false},
	{"tactl explain els", "elsewhere", false}, {"tactl explain 192.0.2.1 --from ", addresses, false}, {"tactl explain 192.0.2.1 --oif wan", wans, false},
	{"tactl explain 192.0.2.1 --iif wan", wans, false}, {"tactl explain 192.0.2.1 --proto u", "udp udplite", false}, {"tactl explain --uid ", users, true}, {"tactl explain --pid ", pid, true},
	{"tactl run ", links, false}, {"tactl run wan", wans, false}, {"tactl run --on-loss ", "block fallback", false}, {"tactl run --on-loss block wan", wans, false},
	{"tactl run wan1 slee", "sleep", false}, {"tactl run -i wan1 slee", "sleep", false}, {"tactl run --ifname wan1 --on-loss block slee", "sleep", false}, {"tactl run wan1 sleep wan", "", false},
	{"tactl attach ", links, true}, {"tactl attach wan1 ", pid, true}, {"tactl attach wan1 wan", "", false}, {"tactl detach ", pid, true}, {"tactl detach wan", wans, false},
	{"tactl bind ", links, false}, {"tactl bind wan1 ", "", false}, {"tactl bind wan1 --uid ", users, true}, {"tactl bind wan1 --proto s", "sctp", false}, {"tactl unbind wan", wans, false},
	{"tactl bound ", links, false}, {"tactl release ", links + " " + addresses, false}, {"tactl release 10", "10.77.0.2", false}, {"tactl release wan0 wan", wans, false}, {"tactl release 2001:d", "2001:db8::2", false},
	{"tactl reexec ", links + " " + addresses, false},
	{"tactl netns ", "add set del list exec ps stop unit serve check import", false}, {"tactl netns exec ", "work", false}, {"tactl netns exec work slee", "sleep", false},
	{"tactl netns add work --ifname wan", wans, false}, {"tactl netns add work --wiring ", "nat macvlan pasta", false}, {"tactl netns del w", "work", false},
}

// TestShells: each shell offers what a command takes and begins with what is typed, and nothing else.
func TestShells(t *testing.T) {
	t.Parallel()
	var lines []string
	for _, q := range questions {
		lines = append(lines, q.line)
	}
	for shell := range askers {
		t.Run(shell, func(t *testing.T) {
			t.Parallel()
			for i, offered := range offers(t, shell, lines) {
				q := questions[i]
				words := set(slices.DeleteFunc(slices.Clone(offered), func(word string) bool { return strings.HasPrefix(word, "-") }))
				want := set(strings.Fields(q.want))
				if q.some {
					words = slices.DeleteFunc(words, func(word string) bool { return !slices.Contains(want, word) })
				}
				if !slices.Equal(words, want) {
					t.Errorf("%q: %q, want %q", q.line, offered, want)
				}
			}
		})
	}
}

// set sorts words, and leaves out what is there twice.
func set(words []string) []string {
	slices.Sort(words)
	return slices.Compact(words)
}

// TestShellsOptions: behind a dash each shell offers the options that --help of the command has, and none behind the command
// that run executes.
func TestShellsOptions(t *testing.T) {
	t.Parallel()
	client, err := filepath.Abs("../../../bin/table-allocator-client")
	if err != nil {
		t.Fatal(err)
	}
	option := regexp.MustCompile(`--[a-z][a-z-]*`)
	names := slices.Concat([]string{""}, strings.Fields(commands))
	names = slices.DeleteFunc(names, func(name string) bool { return name == "netns" }) // whose verbs have options of their own
	lines := []string{"tactl run wan1 true --on-l"}
	for _, name := range names {
		lines = append(lines, strings.TrimRight("tactl "+name, " ")+" --")
	}
	for shell := range askers {
		t.Run(shell, func(t *testing.T) {
			t.Parallel()
			all := offers(t, shell, lines)
			if len(all[0]) > 0 {
				t.Errorf("%q: %q", lines[0], all[0])
			}
			for i, name := range names {
				help, err := exec.Command(client, cmp.Or(name, "-4"), "--help").Output() // -4: without a command
				if err != nil {
					t.Fatal(err)
				}
				_, text, _ := strings.Cut(string(help), "\n\n") // the first lines are no options
				if name == "bind" {
					text = strings.Replace(text, "--all", "", 1)
				}
				want, got := set(option.FindAllString(text, -1)), all[i+1]
				for n := range got {
					got[n], _, _ = strings.Cut(got[n], "=")
				}
				if got = set(got); !slices.Equal(got, want) {
					t.Errorf("%q: %q, want %q", lines[i+1], got, want)
				}
			}
		})
	}
}

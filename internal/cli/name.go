package cli

import (
	"os"
	"path/filepath"
	"strings"
)

// The names of processes. Package peer knows those of clients, too.
const (
	serverName   = "ta-server"
	watchName    = "ta-watch"
	clientName   = "ta-client"
	originalName = "table_allocator" // what the kernel makes of the original's names, of which it keeps 15 bytes
)

// NameProcess sets what ps and top show as the name of the process, which is called by its first argument and executes
// a command word. The kernel would take the first 15 bytes of the file's name, which server, client and watch share.
// Under the original's names it is what the original's is. Arguments and executable stay.
func NameProcess(argument, command string) {
	name := clientName
	switch base := filepath.Base(argument); {
	case strings.HasPrefix(base, originalName):
		name = originalName
	case base == "table-allocator-server":
		name = serverName
	case command == "watch":
		name = watchName
	}
	// The file is that of the first thread, which names the process. Without /proc the name stays.
	_ = os.WriteFile("/proc/self/comm", []byte(name), 0)
}

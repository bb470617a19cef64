package remember

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// RootsFile returns the path of a file without symbolic links: that one has to be opened or executed, since a link may
// change. It returns an error if anybody but root can write to the file, or put another one in its place.
func RootsFile(path string) (string, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	for at := path; ; at = filepath.Dir(at) {
		info, err := os.Lstat(at)
		if err != nil {
			return "", err
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		why := ""
		switch {
		case !ok || stat.Uid != 0:
			why = "is not root's"
		case at != path && info.Mode()&fs.ModeSticky != 0: // in /tmp nobody can replace what is root's
		case info.Mode().Perm()&write != 0:
			why = "is writable for others"
		}
		if why != "" {
			return "", fmt.Errorf("%s is not used, since %s %s: root alone must be able to write it", path, at, why)
		}
		if at == string(filepath.Separator) {
			return path, nil
		}
	}
}

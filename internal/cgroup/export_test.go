package cgroup

import (
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// attachTwice does what a process would that did not look first.
func attachTwice(cgroup *os.File, program *ebpf.Program, h *hook) error {
	return link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: int(cgroup.Fd()), Program: program, Attach: h.spec.AttachType, Flags: allowMulti,
	})
}

// SPDX-License-Identifier: Apache-2.0

package emu

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

// Mode says what a kernel may do with a buffer.
type Mode string

// The modes of a Buffer.
const (
	In    Mode = "in"    // read-only
	Out   Mode = "out"   // write first: poisoned at the start
	InOut Mode = "inout" // starts with Data
)

// Buffer is global memory of a launch. Data holds its content before (In, InOut) and after (Out, InOut).
type Buffer struct {
	Name  string
	Data  []byte
	Mode  Mode
	Align int // its address has this alignment and no better one; 0 = 16
	// Dependent: the preceding kernel may still be using it, until griddep_wait (with Launch.PDL).
	Dependent bool
}

// Ptr is a pointer argument into a buffer.
type Ptr struct {
	Buffer *Buffer
	Offset int
}

// Launch describes one kernel launch. Args are *Buffer, Ptr, nil (a null pointer), or integers.
type Launch struct {
	Kernel      string
	Grid, Block [3]int // zeros count as 1
	Shared      int    // bytes of dynamic shared memory
	Args        []any
	Seed        uint64 // of the schedule; the same seed gives the same run
	Resident    int    // blocks alive at once; 0 = all
	Cluster     int    // blocks along x that run together; 0 = 1. Grid[0] and Resident are multiples of it
	PDL         bool
	// AllowUninitialised lets code read shared memory that was never written (it reads as NaN) without a fault.
	AllowUninitialised bool
	NoRaces            bool          // do not track what is ordered after what: faster
	Timeout            time.Duration // of processor time; 0 = a minute
}

// Stats counts what a launch did.
type Stats struct {
	Switches, Collectives, Copies, BulkBytes, Matrices, Conflicts uint64
}

// Fault is what the emulator found wrong. Kind is one word: race, in-flight, bounds, alignment, uninitialised, deadlock, divergence,
// barrier, mbarrier, cluster, proxy, dependency, wgmma, argument, trap, crash, setup.
type Fault struct {
	Kind string
	Seed uint64
	Text string // everything, with source lines where addr2line could tell them
}

func (f *Fault) Error() string { return fmt.Sprintf("emu: %s (seed %d)\n%s", f.Kind, f.Seed, f.Text) }

// Run executes the launch and updates the buffers' Data.
func (p *Program) Run(ctx context.Context, l Launch) (Stats, error) {
	timeout := l.Timeout
	if timeout == 0 {
		timeout = 60 * time.Second
	}
	// The limit is on processor time, so that a busy machine does not fail tests; the clock is the last resort.
	ctx, cancel := context.WithTimeout(ctx, 20*timeout)
	defer cancel()

	var text bytes.Buffer
	fmt.Fprintf(&text, "seconds %d\n", int(timeout.Seconds())+1)
	buffers, err := describe(&text, l)
	if err != nil {
		return Stats{}, err
	}
	input := []io.Reader{&text}
	for _, b := range buffers {
		if b.Mode != Out {
			input = append(input, bytes.NewReader(b.Data))
		}
	}
	cmd := exec.CommandContext(ctx, p.path)
	cmd.Stdin = io.MultiReader(input...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return Stats{}, &Fault{"timeout", l.Seed, fmt.Sprintf("kernel %s did not end within %v (seed %d)", l.Kernel, 20*timeout, l.Seed)}
		}
		return Stats{}, p.fault(l, err, stderr.String())
	}
	return collect(&stdout, buffers)
}

// describe writes the launch as the emulated program reads it, and returns its buffers in order.
func describe(w io.Writer, l Launch) ([]*Buffer, error) {
	for i := range 3 {
		l.Grid[i], l.Block[i] = max(l.Grid[i], 1), max(l.Block[i], 1)
	}
	fmt.Fprintf(w, "kernel %s\nseed %d\ngrid %d %d %d\nblock %d %d %d\nshared %d\nresident %d\ncluster %d\n", l.Kernel, l.Seed,
		l.Grid[0], l.Grid[1], l.Grid[2], l.Block[0], l.Block[1], l.Block[2], l.Shared, l.Resident, max(l.Cluster, 1))
	flags := []struct {
		on   bool
		name string
	}{{l.PDL, "pdl"}, {l.AllowUninitialised, "allow-uninitialised"}, {l.NoRaces, "no-races"}}
	for _, f := range flags {
		if f.on {
			fmt.Fprintf(w, "flag %s\n", f.name)
		}
	}
	var buffers []*Buffer
	var args bytes.Buffer
	index := func(b *Buffer) int {
		for i, o := range buffers {
			if o == b {
				return i
			}
		}
		buffers = append(buffers, b)
		align, dependent := b.Align, ""
		if align == 0 {
			align = 16
		}
		if b.Dependent {
			dependent = " dependent"
		}
		fmt.Fprintf(w, "buffer %s %d %d %s%s\n", b.Name, len(b.Data), align, b.Mode, dependent)
		return len(buffers) - 1
	}
	for i, a := range l.Args {
		switch a := a.(type) {
		case *Buffer:
			fmt.Fprintf(&args, "arg ptr %d 0\n", index(a))
		case Ptr:
			fmt.Fprintf(&args, "arg ptr %d %d\n", index(a.Buffer), a.Offset)
		case nil:
			fmt.Fprintf(&args, "arg val 0\n")
		case int, int32, int64, uint32, uint64:
			fmt.Fprintf(&args, "arg val %x\n", uint64(toInt(a)))
		default:
			return nil, fmt.Errorf("emu: argument %d of %s has type %T", i, l.Kernel, a)
		}
	}
	_, err := fmt.Fprintf(w, "%sdata\n", args.String())
	return buffers, err
}

func toInt(v any) int64 {
	switch v := v.(type) {
	case int:
		return int64(v)
	case int32:
		return int64(v)
	case int64:
		return v
	case uint32:
		return int64(v)
	case uint64:
		return int64(v)
	}
	panic("emu: not an integer")
}

func collect(r io.Reader, buffers []*Buffer) (Stats, error) {
	var s Stats
	in := bufio.NewReader(r)
	line, err := in.ReadString('\n')
	if err != nil {
		return s, fmt.Errorf("emu: no result: %w", err)
	}
	if _, err := fmt.Sscanf(line, "switches %d collectives %d copies %d bulk_bytes %d matrices %d conflicts %d",
		&s.Switches, &s.Collectives, &s.Copies, &s.BulkBytes, &s.Matrices, &s.Conflicts); err != nil {
		return s, fmt.Errorf("emu: cannot read %q: %w", line, err)
	}
	for _, b := range buffers {
		if b.Mode == In {
			continue
		}
		if _, err := io.ReadFull(in, b.Data); err != nil {
			return s, fmt.Errorf("emu: the result of buffer %s is cut short: %w", b.Name, err)
		}
	}
	return s, nil
}

var faultKind = regexp.MustCompile(`(?m)^fault: (\S+)$`)
var faultPC = regexp.MustCompile(`pc:? ([0-9a-f]+)`)

func (p *Program) fault(l Launch, err error, text string) error {
	kind := faultKind.FindStringSubmatch(text)
	var exit *exec.ExitError
	if kind == nil || !errors.As(err, &exit) {
		return fmt.Errorf("emu: kernel %s, seed %d: %w\n%s", l.Kernel, l.Seed, err, text)
	}
	return &Fault{kind[1], l.Seed, p.locate(strings.TrimSpace(text))}
}

// locate adds the source lines of the code addresses in a fault's text, the innermost inlined function first.
func (p *Program) locate(text string) string {
	return faultPC.ReplaceAllStringFunc(text, func(s string) string {
		pc := faultPC.FindStringSubmatch(s)[1]
		if strings.Trim(pc, "0") == "" {
			return s
		}
		out, err := exec.Command("addr2line", "-i", "-f", "-C", "-s", "-e", p.path, pc).Output()
		if err != nil {
			return s
		}
		var places []string
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		for i := 0; i+1 < len(lines); i += 2 {
			if strings.Contains(lines[i+1], "_host.h") || strings.HasPrefix(lines[i+1], "??") {
				continue
			}
			place, _, _ := strings.Cut(lines[i+1], " ")
			name, _, _ := strings.Cut(lines[i], "(")
			places = append(places, name+" "+place)
		}
		if len(places) == 0 {
			return s
		}
		return s + " = " + strings.Join(places, " < ")
	})
}

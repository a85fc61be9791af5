// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"os"
	"sync"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/jit"
	"github.com/zipserv/zipserv/core/cuda/nvrtc"
	"github.com/zipserv/zipserv/core/cuda/plan"
	"github.com/zipserv/zipserv/core/cuda/tuned"
)

// EnvTuned names the variable that keeps tuned choices out with "0" or "off".
const EnvTuned = "ZIPSERV_TUNED"

// choices are a device's plans that ForLinear did not make: those of the tuned file, and over them those that were set in this process.
type choices struct {
	read sync.Once
	file map[tuned.Problem]plan.Choice
	mu   sync.Mutex
	set  map[tuned.Problem]*plan.Choice // nil: what is done without any choice
}

func problemOf(p plan.Problem) tuned.Problem {
	t := tuned.Problem{M: p.M, K: p.K, Invariant: p.Invariant}
	if !p.Invariant {
		t.Tokens = plan.Bucket(p.N)
	}
	return t
}

// chosen prepares a product as somebody chose, or returns nil where nobody did. A tuned choice that does not work out here is passed over; one that was
// set is an error.
func (d *Device) chosen(p plan.Problem) (*linearPlan, error) {
	key := problemOf(p)
	d.choices.mu.Lock()
	set, known := d.choices.set[key]
	d.choices.mu.Unlock()
	if known {
		if set == nil {
			return nil, nil
		}
		l, err := d.prepareChoice(p, *set)
		if err != nil && p.Unaligned { // chosen for aligned activations
			return nil, nil
		}
		return l, err
	}
	d.choices.read.Do(func() {
		table, _ := d.engine.tuned(d.props) // Describe tells the reason
		d.choices.file = make(map[tuned.Problem]plan.Choice, len(table.Entries))
		for _, e := range table.Entries {
			d.choices.file[e.Problem] = e.Choice
		}
	})
	if c, known := d.choices.file[key]; known {
		if l, err := d.prepareChoice(p, c); err == nil {
			return l, nil
		}
	}
	return nil, nil
}

func (d *Device) prepareChoice(p plan.Problem, c plan.Choice) (*linearPlan, error) {
	l, err := plan.Chosen(d.planDevice, p, c)
	if err != nil {
		return nil, badArgument("%v", err)
	}
	return d.prepareLinear(l)
}

func (d *Device) problem(t tuned.Problem) (plan.Problem, error) {
	if t.M-1 >= maxSide || t.K-1 >= maxSide {
		return plan.Problem{}, badArgument("M and K must be 1 to 2^31-1, got %d and %d", t.M, t.K)
	}
	n := t.Tokens
	if t.Invariant {
		n = 1 // the choice serves every number
	}
	if n-1 >= maxSide {
		return plan.Problem{}, badArgument("the number of tokens must be 1 to 2^31-1, got %d", n)
	}
	return plan.Problem{M: t.M, K: t.K, N: n, Invariant: t.Invariant}, nil
}

// Candidates lists the ways to solve a product that are worth measuring; the first is what is done without a choice.
func (d *Device) Candidates(t tuned.Problem) ([]plan.Choice, error) {
	p, err := d.problem(t)
	if err != nil {
		return nil, err
	}
	return plan.Candidates(d.planDevice, p)
}

// Split is the choice in which that many blocks share every row of a weight.
func (d *Device) Split(t tuned.Problem, shares uint64) (plan.Choice, error) {
	p, err := d.problem(t)
	if err != nil {
		return plan.Choice{}, err
	}
	c, err := plan.Split(d.planDevice, p, shares)
	if err != nil {
		return c, badArgument("%v", err)
	}
	return c, nil
}

// Current is what products of a bucket are solved with now.
func (d *Device) Current(t tuned.Problem) (plan.Choice, error) {
	p, err := d.problem(t)
	if err != nil {
		return plan.Choice{}, err
	}
	l, err := d.chosen(p)
	if err != nil {
		return plan.Choice{}, err
	}
	if l == nil {
		return plan.DefaultChoice(d.planDevice, p)
	}
	return plan.ChoiceOf(l.plan)
}

// Prepare compiles and loads what a choice needs for all numbers of tokens of its bucket, and changes nothing.
func (d *Device) Prepare(t tuned.Problem, c plan.Choice) error {
	p, err := d.problem(t)
	if err != nil {
		return err
	}
	for _, n := range bucketTokens(t) {
		p.N = n
		if _, err := d.prepareChoice(p, c); err != nil {
			return err
		}
	}
	return nil
}

// bucketTokens are numbers of tokens, one for each class that a bucket's choice has to serve.
func bucketTokens(t tuned.Problem) (out []uint64) {
	last := uint64(128)
	if !t.Invariant {
		last = t.Tokens
		if last > 128 { // every class of such a bucket uses the same kernel
			return []uint64{plan.Bucket(last)}
		}
	}
	for n := uint64(1); n <= last; n = plan.Class(n) + 1 {
		if t.Invariant || plan.Bucket(n) == plan.Bucket(t.Tokens) {
			out = append(out, n)
		}
	}
	return out
}

// Choose makes later products of a bucket in this process be solved in that way; nil: as without any choice. Graphs that were captured before keep what they
// have.
func (d *Device) Choose(t tuned.Problem, c *plan.Choice) error {
	p, err := d.problem(t)
	if err != nil {
		return err
	}
	if c != nil {
		if err := d.Prepare(t, *c); err != nil {
			return err
		}
	}
	d.choices.mu.Lock()
	if d.choices.set == nil {
		d.choices.set = map[tuned.Problem]*plan.Choice{}
	}
	d.choices.set[problemOf(p)] = c
	d.choices.mu.Unlock()
	d.forget(problemOf(p))
	return nil
}

// Unchoose takes back what Choose did for a bucket.
func (d *Device) Unchoose(t tuned.Problem) error {
	p, err := d.problem(t)
	if err != nil {
		return err
	}
	d.choices.mu.Lock()
	delete(d.choices.set, problemOf(p))
	d.choices.mu.Unlock()
	d.forget(problemOf(p))
	return nil
}

// forget drops the plans of a bucket, so that they are made anew.
func (d *Device) forget(t tuned.Problem) {
	d.linears.Range(func(key, _ any) bool {
		if k := key.(linearKey); problemOf(plan.Problem{M: k.m, K: k.k, N: k.class, Invariant: k.invariant}) == t {
			d.linears.Delete(k)
		}
		return true
	})
}

// SaveTuned writes measured choices into the file of this device, for later processes and for later first products of this one. It returns the file and how many
// choices are in it.
func (d *Device) SaveTuned(entries []tuned.Entry) (path string, total int, err error) {
	for i, e := range entries {
		p, err := d.problem(e.Problem)
		if err != nil {
			return "", 0, err
		}
		entries[i].Problem = problemOf(p)
		if _, err := plan.Chosen(d.planDevice, p, e.Choice); err != nil {
			return "", 0, badArgument("%v", err)
		}
	}
	key, err := d.engine.tunedKey(d.props)
	if err != nil {
		return "", 0, err
	}
	if d.engine.cacheErr != nil {
		return "", 0, fmt.Errorf("choices are kept in the cache directory, and there is none: %w", d.engine.cacheErr)
	}
	dir := d.engine.compiler.Cache().Dir()
	table, err := tuned.Add(dir, key, entries)
	return tuned.Path(dir, key), len(table.Entries), err
}

func (e *Engine) tunedKey(props driver.Device) (tuned.Key, error) {
	lib, err := e.compiler.Library()
	if err != nil {
		return tuned.Key{}, err
	}
	return keyOf(e, props, lib), nil
}

func keyOf(e *Engine, props driver.Device, lib *nvrtc.Library) tuned.Key {
	return tuned.Key{
		GPU: props.Name, SMs: props.SMs, Driver: e.driver.VersionString(), NVRTC: lib.VersionString(), Kernels: e.compiler.Digest(), Plan: plan.Version,
		ZipServ: packageVersion,
	}
}

// tuned reads the choices of a device; none, and the reason, where its file cannot be trusted.
func (e *Engine) tuned(props driver.Device) (tuned.Table, error) {
	if !tunedOn() {
		return tuned.Table{}, nil
	}
	key, err := e.tunedKey(props)
	if err != nil {
		return tuned.Table{}, err
	}
	return tuned.Read(e.compiler.Cache().Dir(), key)
}

func tunedOn() bool { v := os.Getenv(EnvTuned); return v != "0" && v != "off" }

// TunedFiles lists the files of tuned choices of every GPU and version.
func TunedFiles() ([]tuned.File, error) {
	cache, err := jit.OpenCache()
	if err != nil {
		return nil, err
	}
	return tuned.List(cache.Dir())
}

// ClearTuned removes them. A process that has read them keeps what it has.
func ClearTuned() (int, error) {
	cache, err := jit.OpenCache()
	if err != nil {
		return 0, err
	}
	return tuned.Clear(cache.Dir())
}
